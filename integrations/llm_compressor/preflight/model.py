"""Whether a model can be quantized as it is: finite, whole, and called as modules."""

from __future__ import annotations

import torch
from compressed_tensors.offload import get_offloaded_device
from compressed_tensors.quantization import QuantizationMetadata
from compressed_tensors.utils import match_named_modules
from torch import nn

from moeq_plugin.integrations.llm_compressor.host import running_oneshot
from moeq_plugin.models.moe import MoELayer

_LISTED = 5
_NOT_CUT = ("Qwen3OmniMoeThinkerForConditionalGeneration",)


@torch.no_grad()
def check_finite_weights(model: nn.Module) -> None:
    """Refuse weights with NaN or infinity, whether a token would reach them or not.

    Raises:
        ValueError: naming the first of them and how many there are.
    """
    # scales that a modifier before ours has attached hold whatever the memory held
    unknown = tuple(QuantizationMetadata.all_qparam_names())
    broken = [
        name
        for name, weight in model.named_parameters()
        if not name.endswith(unknown) and not _is_finite(weight)
    ]
    if broken:
        raise ValueError(
            f"{len(broken)} weights of the model contain NaN or infinity, nothing was quantized: "
            f"{', '.join(broken[:_LISTED])}. Download the checkpoint again, or load it in the "
            "dtype that it was trained in."
        )


def _is_finite(weight: torch.Tensor) -> bool:
    if not weight.is_floating_point() or not weight.numel() or weight.is_meta:
        return True
    if weight.element_size() == 1:  # float8, which knows no comparison
        weight = weight.float()
    # both are NaN where anything is; one pass, and no copy of the weight
    return bool(torch.stack(weight.aminmax()).isfinite().all())


def check_merged(model: nn.Module) -> None:
    """Refuse a model with adapters beside its weights, which would be quantized one by one.

    Raises:
        ValueError: saying how to merge them.
    """
    adapted = [name for name, m in model.named_modules() if hasattr(m, "base_layer")]
    if adapted or getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        listed = f" ({len(adapted)} modules, such as {adapted[0]})" if adapted else ""
        raise ValueError(
            f"the model has adapters that are not merged{listed}: merge the adapter first, with "
            "PEFT's model = model.merge_and_unload()"
        )


def check_backward_pass(model: nn.Module) -> None:
    """Refuse a model that no backward pass can be run through, which ``row_feedback`` needs.

    Raises:
        ValueError: naming the weights that are not in memory, or what the model lacks.
    """
    away = [
        name
        for name, module in model.named_modules()
        if get_offloaded_device(module, torch.device("cpu")) == "disk"
        or any(parameter.is_meta for parameter in module.parameters(recurse=False))
    ]
    if away:
        raise ValueError(
            "row_feedback runs one backward pass through the whole model at once, but the weights "
            f"of {len(away)} modules are not in memory, such as {away[0]}: load the model without "
            "offloading to disk, or leave row_feedback off"
        )
    try:
        model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"row_feedback runs a backward pass down to the token embedding, which "
            f"{type(model).__name__} does not name (get_input_embeddings): leave row_feedback off"
        ) from error


def check_cut(model: nn.Module) -> None:
    """Refuse a model that the host cuts into layers in such a way that none of them gets data.

    Raises:
        ValueError: saying what runs it as a whole.
    """
    if type(model).__name__ in _NOT_CUT:
        raise ValueError(
            f"llm-compressor cuts {type(model).__name__} so that its layers get no data, and all "
            'would be rounded to nearest, which was not asked for; oneshot(..., pipeline="basic"), '
            "which holds the whole model in memory, cuts none"
        )


def check_sequential_targets(model: nn.Module, layers: list[MoELayer]) -> None:
    """Refuse sequential targets inside of MoE blocks, whose experts are then called without them.

    The host traces through what a target is in. Which tokens go to an expert is known only where
    the block is called as a whole.

    Raises:
        ValueError: naming the targets and what can be a target.
    """
    running = running_oneshot()
    targets = running.dataset_args.sequential_targets if running is not None else None
    targets = [targets] if isinstance(targets, str) else targets or []
    inner = {m for layer in layers for m in layer.block.modules() if m is not layer.block}
    wrong = [
        target
        for target in targets
        if any(module in inner for _, module in match_named_modules(model, [target]))
    ]
    if wrong:
        whole = sorted({type(layer.block).__name__ for layer in layers})
        decoder = sorted(getattr(model, "_no_split_modules", None) or [])
        raise ValueError(
            f"sequential_targets {wrong} are parts of MoE blocks, which have to be called as a "
            f"whole: use {', '.join(decoder + whole)}, or leave sequential_targets out"
        )
