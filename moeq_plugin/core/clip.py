"""Clip a weight's outliers where that lowers the error of its output.

Rounding to a grid that reaches the largest weight of a group costs all others precision. Clamping
the group to a smaller range trades an error of the outlier for finer steps; AWQ
(arXiv:2306.00978) searches for the best range by the output error on a sample of tokens. Here the
error is read off second moments ``H`` of the inputs (:mod:`moeq_plugin.core.hessian`), so tokens
may be weighted, as Eq. 18 of arXiv:2505.03804 does. MoEQuant's released code clips by the error of
the weights alone, which knows neither inputs nor router.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeq_plugin.core.grid import Grid, choose_grid, dequantize, quantize

RATIOS = tuple(1 - step / 20 for step in range(11))  # AWQ's steps of 5 %, down to half the range


@dataclass(frozen=True)
class Clipped:
    """A weight with its outliers clamped.

    Attributes:
        weight: ``[out, in]`` clamped, not rounded, in the given weight's dtype.
        loss: ``[out]`` float32, ``d @ H @ d / 2`` of each row's change ``d`` by clamping and
            rounding to nearest.
        loss_unclipped: ``[out]``, the same without clamping; never smaller than ``loss``.
    """

    weight: torch.Tensor
    loss: torch.Tensor
    loss_unclipped: torch.Tensor


def clip_weight(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    *,
    ratios: tuple[float, ...] = RATIOS,
) -> Clipped:
    """Clamp each group of each row to the share of its range that loses least.

    A group is judged by itself, by ``d @ H_gg @ d / 2`` with its own block of ``H``, as AWQ does.
    What groups do to each other is then checked: a row whose whole loss would rise keeps its
    weights. AWQ clamps to a range symmetric around 0; so does this for a symmetric grid, while
    for an asymmetric one both ends shrink by the same share.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``; its scale does not matter to the choice.
        grid: what the weight will be rounded to.
        ratios: shares of the range to try, 1 among them or not.

    Returns:
        The clamped weight and its loss; where no ratio helps, the weight as it was.

    Cost: ``len(ratios) * out * in * group_size`` multiplications, twice ``out * in^2`` for the
    check.

    Raises:
        ValueError: if shapes disagree or a ratio is not in (0, 1].

    Example:
        >>> weight = torch.tensor([[1.0, 0.3, -0.3, 0.3]])
        >>> unimportant_outlier = torch.diag(torch.tensor([0.01, 1.0, 1.0, 1.0]))
        >>> clip_weight(weight, unimportant_outlier, Grid(num_bits=2)).weight
        tensor([[ 0.5000,  0.3000, -0.3000,  0.3000]])
    """
    if hessian.shape != (weight.shape[1],) * 2:
        columns = weight.shape[1]
        raise ValueError(f"hessian must be [{columns}, {columns}], got {list(hessian.shape)}")
    if not all(0 < ratio <= 1 for ratio in ratios):
        raise ValueError(f"ratios must lie in (0, 1], got {ratios}")
    hessian = hessian.float()
    num_groups = int(grid.group_of_column(weight.shape[1])[-1]) + 1
    blocks = _diagonal_blocks(hessian, num_groups)
    best = weight
    least = _quadratic(_change(weight, weight, grid), blocks)  # [out, groups]
    for ratio in ratios:
        candidate = _clamp(weight, ratio, num_groups, symmetric=grid.symmetric)
        loss = _quadratic(_change(weight, candidate, grid), blocks)
        is_better = (loss < least).repeat_interleave(weight.shape[1] // num_groups, 1)
        best = torch.where(is_better, candidate, best)
        least = torch.minimum(loss, least)

    whole = hessian[None]
    unclipped = _quadratic(_change(weight, weight, grid), whole)[:, 0]
    clipped = _quadratic(_change(weight, best, grid), whole)[:, 0]
    helps = clipped < unclipped
    return Clipped(
        weight=torch.where(helps[:, None], best, weight),
        loss=torch.where(helps, clipped, unclipped),
        loss_unclipped=unclipped,
    )


def _clamp(weight: torch.Tensor, ratio: float, num_groups: int, *, symmetric: bool) -> torch.Tensor:
    groups = weight.unflatten(1, (num_groups, -1))  # [out, groups, columns of a group]
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:  # the grid reaches as far on both sides: only the longer one costs precision
        high = torch.maximum(high, -low)
        low = -high
    return torch.minimum(torch.maximum(groups, low * ratio), high * ratio).flatten(1)


def _change(weight: torch.Tensor, clamped: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return ``[out, in]`` float32, what clamping and rounding to nearest do to the weight."""
    scale, zero_point = choose_grid(clamped, grid)
    rounded = dequantize(quantize(clamped, scale, zero_point, grid), scale, zero_point, grid)
    change: torch.Tensor = rounded.float() - weight.float()
    return change


def _diagonal_blocks(hessian: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return ``[groups, columns, columns]``, the second moments within each group."""
    blocks = hessian.unflatten(0, (num_groups, -1)).unflatten(2, (num_groups, -1))
    of_groups: torch.Tensor = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return of_groups


def _quadratic(change: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return ``[out, groups]``, ``d @ H @ d / 2`` of each group ``d`` of each row."""
    groups = change.unflatten(1, (len(blocks), -1)).transpose(0, 1)  # [groups, out, columns]
    loss: torch.Tensor = ((groups @ blocks) * groups).sum(-1).T / 2
    return loss
