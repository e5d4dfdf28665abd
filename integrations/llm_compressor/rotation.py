"""ResidualRotationModifier: spread outliers over all channels before quantizing, at no run time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from compressed_tensors.distributed import get_source_rank, is_distributed, is_source_process
from compressed_tensors.offload import get_execution_device, update_offload_parameter
from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from llmcompressor.utils import untie_word_embeddings
from loguru import logger
from torch import distributed, nn
from transformers import PreTrainedModel

from moeq_plugin.core.hadamard import Rotation, random_rotation
from moeq_plugin.integrations.llm_compressor import preflight
from moeq_plugin.integrations.llm_compressor.calibration import ranks
from moeq_plugin.integrations.llm_compressor.host import run_routed_tokens_only
from moeq_plugin.integrations.llm_compressor.schemes import weight_of
from moeq_plugin.models.residual import ResidualStream, find_residual_stream


class ResidualRotationModifier(Modifier):
    """Rotates the residual stream by one random Hadamard matrix, fused into the weights.

    The rotation of QuaRot (arXiv:2404.00456, section 4, stage 1a) and R1 of SpinQuant
    (arXiv:2405.16406), which MoEQuant (arXiv:2505.03804) stacks its method on and calls MoEQuant++.
    With RMSNorm weights folded into what follows them, the model computes what it did, and the
    checkpoint is an ordinary one: nothing is rotated at run time. Value heads and the input of
    ``down_proj`` are not rotated; the latter would need a rotation at run time.

    Happens in ``on_initialize``, once, so put it before the modifiers that quantize::

        quant_stage:
          quant_modifiers:
            ResidualRotationModifier: {seed: 0}
            MoEQuantModifier: {scheme: W4A16}

    Computed in float64 and stored in each weight's own dtype. Tied embeddings are untied: the
    weight of the last norm is folded into the output embedding only.

    The host's ``SpinQuantModifier`` (0.14) does not know routers, and centers embeddings, which
    RMSNorm does not forgive; ``QuIPModifier`` leaves a rotation to be done at run time.

    Args:
        seed: of the random signs.
    """

    requires_calibration_data: bool = False

    seed: int = 0

    def on_initialize(self, state: State, **kwargs: object) -> bool:
        """Rotate the model in place and make sure that it computes what it did.

        Raises:
            UnsupportedModelError: if it is not known how some parameter touches the residual
                stream; nothing has been changed then.
            ValueError: if the modifier comes too late in the recipe; nothing has been changed
                then. Or if the logits changed: then the model in memory is of no use any more.
        """
        model = state.model
        _check_order(model)
        preflight.check_finite_weights(model)
        stream = find_residual_stream(model)
        ids = _probe_tokens(stream)
        before = _logits(model, ids)
        if model.config.get_text_config().tie_word_embeddings:
            untie_word_embeddings(model)
            logger.warning(
                "the embeddings were tied; rotated they differ by the weight of the last norm and "
                "are saved apart (config.tie_word_embeddings is false now)"
            )
        if getattr(model.config.get_text_config(), "num_mtp_layers", 0):
            logger.warning(
                "layers for multi-token prediction are not loaded and not rotated: they fit the "
                "rotated model no longer, so leave speculative decoding with them off"
            )
        rotation = random_rotation(
            stream.size, seed=self.seed, hadamard_of=lambda order: _hadamard(order, self.seed)
        )
        rotate(stream, rotation)
        _check_unchanged(model, before, _logits(model, ids))
        return True


@torch.no_grad()
def rotate(stream: ResidualStream, rotation: Rotation) -> None:
    """Rotate everything that touches the residual stream, in place, one weight at a time.

    Of several processes, which may share the weights, one rotates and all wait for it.

    Args:
        stream: what touches it.
        rotation: of its size.
    """
    ranks.wait_for_all()  # some may still be running the model as it was
    rotation = rotation.to(_float64_device())
    _replace(stream.embedding, "weight", rotation.of_reader)
    for read in stream.reads:
        fold = partial(rotation.of_reader, scale=weight_of(read.norm))
        for reader in read.readers:
            _replace(reader, "weight", fold)
        _replace(read.norm, "weight", torch.ones_like)
    for writer in stream.writers:
        _replace(writer, "weight", rotation.of_writer)
        if getattr(writer, "bias", None) is not None:
            _replace(writer, "bias", rotation.of_bias)
    ranks.wait_for_all()


def _float64_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":  # Apple's knows no float64
        return torch.device("cpu")
    return accelerator


def _replace(module: nn.Module, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    old = getattr(module, name)
    new = change(old) if is_source_process() else old.new_empty(old.shape)
    if is_distributed():
        distributed.broadcast(new, src=get_source_rank())
    update_offload_parameter(module, name, new)


def _hadamard(order: int, seed: int) -> torch.Tensor | None:
    try:
        generator = torch.Generator().manual_seed(seed)
        matrix: torch.Tensor = random_hadamard_matrix(order, dtype=torch.float64, gen=generator)
        return matrix
    except ValueError:  # the library tells in no other way which orders it knows
        return None


def _check_order(model: PreTrainedModel) -> None:
    linears = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    preflight.check_merged(model)
    preflight.check_not_quantized(linears)
    scheduled = [n for m, n in linears.items() if getattr(m, "quantization_scheme", None)]
    if scheduled:
        raise ValueError(
            f"ResidualRotationModifier comes after a modifier that quantizes {scheduled[0]} and "
            f"{len(scheduled) - 1} others: rotating what is quantized would undo it. Put it first "
            "in the recipe."
        )


def _probe_tokens(stream: ResidualStream) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(weight_of(stream.embedding)), (2, 16), generator=generator)
    return ids.to(get_execution_device(stream.embedding))


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return ``[tokens, vocabulary]`` float32; experts run on their own tokens only."""
    with contextlib.ExitStack() as undo:
        run_routed_tokens_only(model, undo)
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits.float().flatten(0, 1)


def _check_unchanged(model: PreTrainedModel, before: torch.Tensor, after: torch.Tensor) -> None:
    # of the median token: where two experts score almost alike, rounding may swap them
    change = ((after - before).norm(dim=-1) / before.norm(dim=-1)).median().item()
    bound = max(1e-4, 32 * torch.finfo(model.dtype).eps)
    if not change <= bound:
        raise ValueError(
            f"rotating {type(model).__name__} changed its logits by {change:.2g} of their size, "
            f"where rounding to {model.dtype} accounts for {bound:.2g}: the model in memory is of "
            "no use now. Load it again and leave ResidualRotationModifier out, and please report "
            "this architecture."
        )
    logger.info(f"rotated; the logits of random tokens changed by {change:.2g} of their size")
