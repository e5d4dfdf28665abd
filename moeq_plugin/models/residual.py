"""Find who reads and who writes a model's residual stream.

The stream is written by the token embedding, attention outputs and MLP outputs, and read, each time
behind an RMSNorm, by attention inputs, MLP inputs, routers, shared-expert gates and the output
embedding. Projections go by the names that they have in every decoder of transformers. The list has
to be complete or a rotation would break the model, so every parameter of the model has to be in it
or be known not to touch the stream; otherwise the model is refused and what is unknown is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from moeq_plugin.models.moe import MoELayer, UnsupportedModelError, find_moe_layers

ATTENTION_READERS = ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa")
_MLP_READERS = ("gate_proj", "up_proj")
# behind the first projections of attention: q-k norms, DeepSeek's compressed q and kv, sinks
_INSIDE_ATTENTION = (
    "q_norm", "k_norm", "q_a_layernorm", "kv_a_layernorm", "q_b_proj", "kv_b_proj",
)  # fmt: skip


@dataclass(frozen=True)
class NormedRead:
    """An RMSNorm and all that reads the residual stream through it.

    Attributes:
        norm: has a ``weight`` of the size of the stream.
        readers: linears and routers with a ``weight`` of ``[out, hidden]``.
    """

    norm: nn.Module
    readers: list[nn.Module]


@dataclass(frozen=True)
class ResidualStream:
    """Everything that touches the residual stream of a decoder.

    Attributes:
        size: number of channels.
        embedding: the token embedding.
        reads: two per decoder layer, and that of the output embedding.
        writers: linears with a ``weight`` of ``[hidden, in]``, and maybe a bias.
    """

    size: int
    embedding: nn.Module
    reads: list[NormedRead]
    writers: list[nn.Module]


def find_residual_stream(model: nn.Module) -> ResidualStream:
    """Return what reads and writes the residual stream; experts have to be linearized.

    Args:
        model: a causal language model of transformers, or one of its structure.

    Raises:
        UnsupportedModelError: if something is not known to read, write or leave it alone; nothing
            has been changed then.
    """
    embedding, head = _embeddings(model)
    moe_layers = {layer.block: layer for layer in find_moe_layers(model)}
    reads, writers, inside = [], [], []
    for layer in model.modules():
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if attention is None or mlp is None:
            continue
        before_attention = _children(layer, ("input_layernorm",))
        before_mlp = _children(layer, ("post_attention_layernorm",))
        if not before_attention or not before_mlp:
            continue  # its norms are reported as unknown
        mlp_readers, mlp_writers = _of_mlp(mlp, moe_layers.get(mlp))
        reads.append(NormedRead(before_attention[0], _children(attention, ATTENTION_READERS)))
        reads.append(NormedRead(before_mlp[0], mlp_readers))
        writers += [*_children(attention, ("o_proj",)), *mlp_writers]
        inside += _children(attention, _INSIDE_ATTENTION)
    final_norm = getattr(getattr(model, "model", None), "norm", None)
    if isinstance(final_norm, nn.Module):
        reads.append(NormedRead(final_norm, [head]))
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)  # an embedding has one
    stream = ResidualStream(weight.shape[1], embedding, reads, writers)
    _check_complete(model, stream, inside)
    for read in reads:
        _check_norm(model, read.norm)
    return stream


def _of_mlp(mlp: nn.Module, layer: MoELayer | None) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return what reads and what writes the stream in a dense MLP or a MoE block.

    Raises:
        UnsupportedModelError: if the experts are fused.
    """
    mlps = [mlp]
    readers: list[nn.Module] = []
    if layer is not None:
        if not isinstance(layer.experts, nn.ModuleList):
            raise UnsupportedModelError(
                f"{layer.name}: the experts are fused; linearize the model first "
                "(llmcompressor.modeling.moe.linearize.linearize_moe)"
            )
        mlps = [layer.expert(index) for index in range(layer.num_experts)]
        mlps += [layer.shared_expert] if layer.shared_expert is not None else []
        routers = (layer.router, layer.shared_gate)
        readers = [_with_weight(part) for part in routers if part is not None]
    readers += [child for part in mlps for child in _children(part, _MLP_READERS)]
    return readers, [child for part in mlps for child in _children(part, ("down_proj",))]


def _with_weight(router: nn.Module) -> nn.Module:
    """Return a router, or the one linear that it consists of (Hunyuan's, DBRX's).

    Raises:
        UnsupportedModelError: if it consists of more.
    """
    inner = [module for module in router.modules() if "weight" in module._parameters]
    if len(inner) != 1:
        raise UnsupportedModelError(
            f"{type(router).__name__} consists of {len(inner)} modules with weights; it is not "
            "known which of them read the residual stream"
        )
    return inner[0]


def _embeddings(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the token embedding and the output embedding.

    Raises:
        UnsupportedModelError: if there are not both.
    """
    names = ("get_input_embeddings", "get_output_embeddings")
    found = [getattr(model, name, lambda: None)() for name in names]
    embeddings = [module for module in found if isinstance(module, nn.Module)]
    if len(embeddings) < 2:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no input or no output embedding to rotate; a rotation "
            "needs a causal language model"
        )
    return embeddings[0], embeddings[1]


def _children(module: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    children = (getattr(module, name, None) for name in names)
    return [child for child in children if isinstance(child, nn.Module)]


def _check_complete(model: nn.Module, stream: ResidualStream, inside: list[nn.Module]) -> None:
    """Refuse a model of which anything is neither in the stream nor known to be outside.

    Raises:
        UnsupportedModelError: naming the first ten parameters.
    """
    readers = {reader for read in stream.reads for reader in read.readers}
    writers = set(stream.writers)
    known = {stream.embedding, *(read.norm for read in stream.reads), *readers, *writers, *inside}
    unknown = [name for name, _ in _parameters_outside(model, known)]
    wrong = [
        name
        for name, module in model.named_modules()
        if (module in readers and getattr(module, "in_features", stream.size) != stream.size)
        or (module in writers and getattr(module, "out_features", stream.size) != stream.size)
    ]
    if unknown or wrong or not stream.writers:
        raise UnsupportedModelError(
            f"cannot rotate {type(model).__name__}: it is not known how these touch the residual "
            f"stream: {', '.join((unknown + wrong)[:10]) or 'no decoder layers found'}"
            f"{' ...' if len(unknown + wrong) > 10 else ''}. Nothing was changed. Quantize without "
            "the rotation."
        )


def _parameters_outside(
    model: nn.Module, known: set[nn.Module]
) -> Iterator[tuple[str, nn.Parameter]]:
    for name, module in model.named_modules():
        if module in known:
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter_name != "sinks":  # one number per attention head
                yield f"{name}.{parameter_name}", parameter


def _check_norm(model: nn.Module, norm: nn.Module) -> None:
    """Refuse a norm that rotations do not commute with, or whose weight is not a plain factor.

    Raises:
        UnsupportedModelError: naming the norm.
    """
    weight = norm.weight
    assert isinstance(weight, torch.Tensor)  # its parameters were found complete
    # off centre, since a norm that subtracts the mean would leave centred rows alone
    rows = 1 + torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0))
    rows = rows.to(weight)
    expected = rows.float() * rows.float().square().mean(-1, keepdim=True).rsqrt() * weight.float()
    # 2 %: bfloat16 rounds by up to 0.4 % three times
    if (norm(rows).float() - expected).norm() > 0.02 * expected.norm():
        name = next(name for name, module in model.named_modules() if module is norm)
        raise UnsupportedModelError(
            f"cannot rotate {type(model).__name__}: {name} ({type(norm).__name__}) is no RMSNorm "
            "whose weight multiplies the result, so rotating its input would change the model. "
            "Nothing was changed. Quantize without the rotation."
        )
