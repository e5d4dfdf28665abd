"""Compare what AWQ or SmoothQuant rescaled: columns by any factors, some rows by others.

Scales of columns are what such methods change, and the norm or the linear before makes up for them.
So they are fitted; that leaves everything else to be compared as for other checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeq_plugin.checkpoint.architecture import Linear

_SCALED_ROWS = ("up_proj", "v_proj", "kv_b_proj")  # they make up for what follows them
_STEPS = 4


@dataclass(frozen=True)
class Fit:
    """A weight's original, rescaled to fit it.

    Attributes:
        original: ``[out, in]``.
        columns: ``[in]``, the factors of the columns.
        rows: ``[out]``, the factors of the rows; ones where they do not change.
    """

    original: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor


def fit(weight: torch.Tensor, original: torch.Tensor, linear: Linear) -> Fit:
    """Return the original with factors for its columns, and rows where they may have some.

    Args:
        weight: ``[out, in]`` float32.
        original: likewise.
        linear: whose.
    """
    columns, rows = original.new_ones(original.shape[1]), original.new_ones(original.shape[0])
    has_rows = linear.name.rpartition(".")[2] in _SCALED_ROWS
    for _ in range(_STEPS if has_rows else 1):
        scaled = original * rows[:, None]
        columns = _slope(weight, scaled, 0)
        if has_rows:
            rows = _slope(weight, original * columns, 1)
    return Fit(original * rows[:, None] * columns, columns, rows)


def odd_factors(found: Fit) -> str | None:
    """Return what no rescaling does: it takes no row or column to nothing, and turns no sign."""
    for name, factors in (("rows", found.rows), ("columns", found.columns)):
        odd = int((factors <= 1e-4 * factors.median()).sum())
        if odd > 0.02 * len(factors):
            return f"{odd} of {len(factors)} {name} are zero or turned round"
    return None


def _slope(weight: torch.Tensor, original: torch.Tensor, dim: int) -> torch.Tensor:
    squares = original.square().sum(dim)
    slope: torch.Tensor = (weight * original).sum(dim) / squares.clamp_min(1e-30)
    return torch.where(squares > 0, slope, 1.0)
