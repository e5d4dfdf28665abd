"""In which order the linears of a decoder layer are rounded: that in which it computes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from moeq_plugin.models.decoders import DecoderLayer
from moeq_plugin.models.residual import ATTENTION_READERS


@dataclass(frozen=True)
class Stage:
    """Linears of a layer of which none depends on another.

    Attributes:
        linears: the linears.
        source: module whose input is that of all the linears in the 16-bit stream, which need not
            run on from there; ``None`` if each has its own.
        alone: those of the linears that are called with all tokens of a batch.
        until: what the layer need not run from any more, once the linears have been called;
            ``None`` where they are in the last of its modules.
        residual: the norm whose input the linears' output is added to; ``None`` for linears that
            do not write to the residual stream.
    """

    linears: tuple[nn.Linear, ...]
    alone: tuple[nn.Linear, ...]
    source: nn.Module | None = None
    until: nn.Module | None = None
    residual: nn.Module | None = None


def stages_of(layer: DecoderLayer, targeted: Collection[nn.Module]) -> list[Stage]:
    """Return the stages of a layer in their order, those without a linear too.

    Args:
        layer: the layer.
        targeted: what is to be rounded.
    """
    out = layer.attention.child("o_proj").module
    readers = [getattr(layer.attention.module, name, None) for name in ATTENTION_READERS]
    attention = _linears(layer.attention.module, targeted)
    first = [linear for linear in attention if linear in readers]
    inside = [linear for linear in attention if linear not in readers and linear is not out]
    mlp_linears = _linears(layer.mlp.module, targeted)
    downs = {getattr(part, "down_proj", None) for part in layer.mlp.module.modules()}
    norm, mlp = layer.mlp_norm.module, layer.mlp.module
    experts = getattr(mlp, "experts", None)
    routed = set(experts.modules()) if isinstance(experts, nn.Module) else set()

    def stage(linears: list[nn.Linear], **others: nn.Module) -> Stage:
        alone = tuple(linear for linear in linears if linear not in routed)
        return Stage(tuple(linears), alone, **others)

    return [
        stage(first, until=out),
        stage(inside, until=out),
        stage(
            [linear for linear in attention if linear is out],
            until=norm,
            residual=layer.attention_norm.module,
        ),
        stage([linear for linear in mlp_linears if linear not in downs], source=mlp),
        stage([linear for linear in mlp_linears if linear in downs], residual=norm),
    ]


def _linears(module: nn.Module, targeted: Collection[nn.Module]) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear) and m in targeted]
