"""Compare what a rotation changed by what no rotation changes: the lengths of rows and columns."""

from __future__ import annotations

import torch

from moeq_plugin.checkpoint.architecture import Linear, Role
from moeq_plugin.checkpoint.codes import can_read, read_tensor
from moeq_plugin.checkpoint.headers import StoredTensor

RESIDUAL = "ResidualRotationModifier"  # turns the residual stream and nothing else
_WRITERS = ("o_proj", "down_proj")
_READERS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"), "input"),
    **dict.fromkeys(("gate_proj", "up_proj"), "post_attention"),
}
_TOLERANCE, _OF_ALL = 0.15, 0.5
_CLIPPED = 3.0  # how far errors may exceed what rounding to nearest makes


def reads_residual(linear: Linear) -> str | None:
    """Return the norm before a linear that reads the residual stream, ``None`` for others."""
    if linear.role is Role.HEAD:
        return "model.norm"
    if linear.role in {Role.ROUTER, Role.SHARED_GATE}:
        which: str | None = "post_attention"
    else:
        which = _READERS.get(linear.name.rpartition(".")[2])
    return f"model.layers.{linear.layer}.{which}_layernorm" if which else None


def writes_residual(linear: Linear) -> bool:
    """Tell whether a linear's outputs are added to the residual stream."""
    return linear.name.rpartition(".")[2] in _WRITERS


def with_norm(original: torch.Tensor, norm: StoredTensor | None) -> torch.Tensor:
    """Return a reader's original with the norm before it folded in, as a rotation needs it."""
    if norm is None or not can_read(norm) or norm.shape != original.shape[1:]:
        return original
    return original * read_tensor(norm).float()


def other_lengths(
    weight: torch.Tensor, original: torch.Tensor, dim: int | None, grid: float
) -> str | None:
    """Return how many rows or columns are longer or shorter than before.

    Args:
        weight: ``[out, in]`` float32.
        original: likewise, norms folded in.
        dim: 1 to compare rows, 0 for columns, ``None`` for the whole.
        grid: relative error that rounding to nearest makes.
    """
    margin = 1 + (_CLIPPED * grid) ** 2 / 2
    if dim is None:
        ratio = weight.norm() / original.norm().clamp_min(1e-30)
        low, high = 1 - _OF_ALL, (1 + _OF_ALL) * margin
        return None if low <= float(ratio) <= high else f"{float(ratio):.2f} times as long"
    before, after = original.norm(dim=dim), weight.norm(dim=dim)
    alive = before > 1e-3 * before.mean()
    ratio = torch.where(alive, after / before.clamp_min(1e-30), 1.0)
    off = (ratio < (1 - _TOLERANCE) / margin) | (ratio > (1 + _TOLERANCE) * margin) | ratio.isnan()
    if not bool(off.any()):
        return None
    what = "rows" if dim else "columns"
    furthest = float(ratio[off][(ratio[off] - 1).abs().argmax()])
    return f"{int(off.sum())} of {len(off)} {what} are up to {furthest:.2f} times as long as before"
