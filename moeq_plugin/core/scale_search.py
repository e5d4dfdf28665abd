"""Search the scale of each group of weights among a few shares of its range.

A scale that does not reach the largest weights makes the steps between all others finer. What a
candidate costs is judged before anything is compensated, by one of three measures of the errors
``e`` of rounding to nearest:

* :func:`power_cost`: ``sum |e|^p``, with 2.4 as the host's ``memoryless_mse`` observer does. An
  exponent above 2 spares the largest errors, which GPTQ makes larger still: its compensation pushes
  more weights beyond a clipped range than lie there at first. The further a search goes from the
  range, the more that matters.
* :func:`weighted_cost`: ``sum d_j e_j^2``.
* :func:`quadratic_cost`: ``e @ H_gg @ e``, with the group's own block of the Hessian.

The codes of a symmetric grid run from ``-2^(b-1)`` to ``2^(b-1) - 1``. A negative scale turns them
around, so that the code without a counterpart stands on the side where it is needed. The zero point
of an asymmetric grid is an integer; with few bits the nearest one is often not the better of the
two around the exact place, and both are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from moeq_plugin.core.grid import Grid, grid_of_range, in_groups, nearest_code, point_of_code
from moeq_plugin.core.parts import row_parts

Cost = Callable[[torch.Tensor], torch.Tensor]
"""From errors ``[experts, out, groups, columns of a group]`` to ``[experts, out, groups]``."""

NARROW = tuple(1 - step / 100 for step in range(20))
"""At most 20 % off the range, as the host's ``memoryless_mse``."""

MODERATE = tuple(1 - step / 60 for step in range(25))
"""At most 40 % off the range."""

_IN_CACHE = 2**17  # a candidate takes a dozen passes over the weights
_WIDEST, _STEPS = 1.1, 32
_NARROWEST = {2: 0.25, 3: 0.4, 4: 0.55}  # of the range, by bits


def wide(num_bits: int) -> tuple[float, ...]:
    """Return shares of the range from a tenth above it to where few bits may want it."""
    narrowest = _NARROWEST.get(num_bits, 0.6)
    step = (_WIDEST - narrowest) / (_STEPS - 1)
    return tuple(narrowest + i * step for i in range(_STEPS))


def search_scales(
    weight: torch.Tensor,
    grid: Grid,
    shares: Sequence[float],
    cost: Cost,
    *,
    signed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and zero point of each group that cost least.

    Args:
        weight: ``[experts, out, in]``.
        grid: the grid's description.
        shares: of each group's range that are tried; where two cost the same, the first wins.
        cost: judges the errors that rounding to nearest makes.
        signed: try both signs of the scale. No use on an asymmetric grid, whose codes reach as far
            as they have to on either side.

    Returns:
        ``scale`` ``[experts, out, groups]`` in the weight's dtype, rounded to it before it was
        judged, and ``zero_point``, int8. Without ``signed`` all scales are positive.

    Raises:
        ValueError: if a share is not positive, there is none, or ``signed`` meets an asymmetric
            grid.

    Example:
        >>> weight = torch.tensor([[[1.0, 0.9, 0.9, -0.4]]])
        >>> search_scales(weight, Grid(2), [1.0, 0.75], power_cost(2.0), signed=True)[0]
        tensor([[[-0.5000]]])
    """
    if not shares or min(shares) <= 0:
        raise ValueError(f"shares must be positive, got {tuple(shares)}")
    if signed and not grid.symmetric:
        raise ValueError("an asymmetric grid has no use for the sign of its scale")
    found = [
        _search_rows(weight[:, rows], grid, shares, cost, signed)
        for rows in row_parts(weight, _IN_CACHE)
    ]
    return torch.cat([scale for scale, _ in found], 1), torch.cat([zero for _, zero in found], 1)


def _search_rows(
    weight: torch.Tensor, grid: Grid, shares: Sequence[float], cost: Cost, signed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = in_groups(weight, grid)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    groups = groups.float()
    best = grid_of_range(low, high, grid)
    least = torch.full_like(best[0], torch.inf, dtype=torch.float32)
    for share in shares:
        for candidate in _candidates(low * share, high * share, grid, signed):
            codes = nearest_code(groups, candidate[0][..., None], candidate[1][..., None], grid)
            points = point_of_code(codes, candidate[0][..., None], candidate[1][..., None])
            found = cost(groups - points.float())
            is_better = found < least
            least = torch.where(is_better, found, least)
            best = (
                torch.where(is_better, candidate[0], best[0]),
                torch.where(is_better, candidate[1], best[1]),
            )
    return best


def _candidates(
    low: torch.Tensor, high: torch.Tensor, grid: Grid, signed: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the scales and zero points that reach from ``low`` to ``high``, or nearly so."""
    scale, zero_point = grid_of_range(low, high, grid)
    yield scale, zero_point
    if signed:
        yield -scale, zero_point
    if not grid.symmetric:
        is_above = grid.lowest - low / scale < zero_point
        other = torch.where(is_above, zero_point - 1, zero_point + 1)
        yield scale, other.clamp(grid.lowest, grid.highest)


def power_cost(exponent: float) -> Cost:
    """Return ``sum |e|^exponent``."""
    return lambda errors: errors.abs().pow(exponent).sum(-1)


def weighted_cost(column_weights: torch.Tensor, num_groups: int) -> Cost:
    """Return ``sum d_j e_j^2`` for ``d`` ``[experts, in]``."""
    weights = column_weights.unflatten(-1, (num_groups, -1))[:, None]
    return lambda errors: (errors.square() * weights).sum(-1)


def quadratic_cost(hessian: torch.Tensor, num_groups: int) -> Cost:
    """Return ``e @ H_gg @ e`` for ``H`` ``[experts, in, in]``."""
    blocks = hessian.unflatten(2, (num_groups, -1)).unflatten(1, (num_groups, -1))
    of_groups = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [experts, groups, ., .]

    def cost(errors: torch.Tensor) -> torch.Tensor:
        rows = errors.transpose(1, 2)  # [experts, groups, out, columns of a group]
        found: torch.Tensor = ((rows @ of_groups) * rows).sum(-1).transpose(1, 2)
        return found

    return cost
