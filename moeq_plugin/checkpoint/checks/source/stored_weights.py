"""Read a weight of a checkpoint in whatever scheme it is stored in."""

from __future__ import annotations

import torch

from moeq_plugin.checkpoint.architecture import Linear
from moeq_plugin.checkpoint.checks.source.rounding import Rounding, measure, measure_floats
from moeq_plugin.checkpoint.codes import blocks, read_tensor
from moeq_plugin.checkpoint.headers import StoredTensor
from moeq_plugin.checkpoint.layout import Layout


def stored_weight(layout: Layout, linear: Linear) -> torch.Tensor:
    """Return ``[out, in]`` float32, what a readable linear's tensors stand for."""
    scheme, found = layout.stored[linear.name], layout.modules[linear.name]
    if scheme is None:
        return read_tensor(found["weight"]).float()
    if scheme.is_float:
        return _floats(found, scheme.strategy)
    return torch.cat([block.weight() for block in blocks(found, scheme, linear.shape)])


def first_rows(layout: Layout, linear: Linear, count: int) -> torch.Tensor:
    """Return up to ``count`` rows of :func:`stored_weight`."""
    scheme, found = layout.stored[linear.name], layout.modules[linear.name]
    if scheme is None or scheme.is_float:
        return stored_weight(layout, linear)[:count]
    block = next(blocks(found, scheme, linear.shape))
    return block.weight()[:count]


def rounding_of(layout: Layout, linear: Linear, original: torch.Tensor) -> Rounding:
    """Return what rounding did to a readable, quantized linear."""
    scheme, found = layout.stored[linear.name], layout.modules[linear.name]
    assert scheme is not None
    if scheme.is_float:
        return measure_floats(_floats(found, scheme.strategy), original)
    return measure(blocks(found, scheme, linear.shape), original)


def _floats(found: dict[str, StoredTensor], strategy: str) -> torch.Tensor:
    weight = read_tensor(found["weight"]).float()
    scale = read_tensor(found["weight_scale"]).float()
    if strategy == "block":
        scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        scale = scale[: weight.shape[0], : weight.shape[1]]
    return weight * scale
