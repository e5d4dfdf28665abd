"""GPTQ (arXiv:2210.17323) for a stack of weights of one shape, such as all experts of a layer.

Columns are rounded one after the other; what a column loses is passed on to the columns that are
still to come, along the rows of a triangular factor of the inverse Hessian. Same steps and same
order as the paper's reference, with these differences:

* All experts advance together, ``[experts, in, out]``: one column step is one batched operation.
* Columns are stored last first and processed from the end. Then the factor is the inverse of the
  Hessian's own Cholesky factor: one factorization and one triangular inverse instead of
  Cholesky, inverse, Cholesky, with smaller rounding errors.
* A dead input column (zero on the diagonal) keeps its weights, rounded to nearest. The reference
  sets them to zero, which silences a feature that the calibration data merely did not exercise.
* A Hessian that resists a thousand times the damping falls back to rounding to nearest and is
  reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moeq_plugin.core.column_order import in_turn
from moeq_plugin.core.factorization import Factorization, factorize
from moeq_plugin.core.grid import Grid, nearest_code, point_of_code


@dataclass(frozen=True)
class Solution:
    """The result of :func:`solve`.

    Attributes:
        weight: ``[experts, out, in]`` dequantized weights, on the grid, in the scale's dtype.
        loss: ``[experts, out]`` float32, half of each row's share of ``trace(D @ H @ D.T)`` with
            the damped Hessian.
        is_nearest: ``[experts]`` bool, true where the Hessian could not be factorized and the
            weights are merely rounded to nearest.
    """

    weight: torch.Tensor
    loss: torch.Tensor
    is_nearest: torch.Tensor


def solve(
    weight: torch.Tensor,
    hessians: Sequence[torch.Tensor],
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grid: Grid,
    *,
    block_size: int = 128,
    dampening_frac: float = 0.01,
    actorder: bool = True,
) -> Solution:
    """Round each weight to its grid so that ``trace(D @ H @ D.T)`` stays small.

    Args:
        weight: ``[experts, out, in]``, any float dtype; not modified.
        hessians: for each expert ``[in, in]`` second moments, as a list or a stack; zeros on the
            diagonal are overwritten. A positive factor per expert changes nothing.
        scale: ``[experts, out, groups]``, positive.
        zero_point: ``[experts, out, groups]``.
        grid: the grid's description.
        block_size: columns whose updates are applied to the rest at once; speed only.
        dampening_frac: fraction of the mean diagonal that is added to the diagonal.
        actorder: quantize columns in descending order of their second moment ("static" order:
            groups stay where they are, nothing is stored).

    Returns:
        The weights on their grids, the loss and where rounding to nearest was all that worked.

    Raises:
        ValueError: if shapes disagree.
    """
    check_shapes(weight, hessians, scale)
    factorization = factorize(hessians, dampening_frac=dampening_frac, actorder=actorder)
    return round_columns(weight, factorization, scale, zero_point, grid, block_size=block_size)


def round_columns(
    weight: torch.Tensor,
    factorization: Factorization,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grid: Grid,
    *,
    block_size: int = 128,
) -> Solution:
    """Round each weight along a factorization; arguments as of :func:`solve`."""
    order, factor = factorization.order, factorization.factor
    W = in_turn(weight, order).float()
    group = grid.group_of_column(weight.shape[2]).to(weight.device)[order]
    loss = _round_blocks(W, factor, scale, zero_point, group, grid, block_size)
    result = torch.empty(weight.shape, dtype=scale.dtype, device=weight.device)
    for rounded, w, o in zip(result, W, order.argsort(dim=1), strict=True):
        rounded.copy_(w.index_select(0, o).T)
    return Solution(result, loss, factorization.is_nearest)


def _round_blocks(
    W: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    group: torch.Tensor,
    grid: Grid,
    block_size: int,
) -> torch.Tensor:
    """Replace the columns of ``W`` ``[experts, in, out]`` by grid points, last column first.

    Returns:
        ``[experts, out]`` losses.
    """
    loss = W.new_zeros(W.shape[0], W.shape[2])
    for end in range(W.shape[1], 0, -block_size):
        start = max(0, end - block_size)
        block = W[:, start:end]  # a view: rounding it in place is the result
        errors = torch.empty_like(block)
        columns = group[:, None, start:end].expand(-1, scale.shape[1], -1)
        scales = scale.gather(2, columns).transpose(1, 2).contiguous()  # [experts, block, out]
        zeros = zero_point.gather(2, columns).transpose(1, 2).to(W.dtype).contiguous()
        within = factor[:, start:end, start:end]
        diagonal = within.diagonal(dim1=1, dim2=2)[..., None]
        for i in range(end - start - 1, -1, -1):
            column = block[:, i]
            codes = nearest_code(column, scales[:, i], zeros[:, i], grid)
            rounded = point_of_code(codes, scales[:, i], zeros[:, i]).to(W.dtype)
            errors[:, i] = (column - rounded) / diagonal[:, i]
            block[:, i] = rounded
            # a rank-one update: as one broadcast it is faster than a product per expert
            block[:, :i].addcmul_(within[:, i, :i, None], errors[:, i, None], value=-1)
        W[:, :start].baddbmm_(factor[:, start:end, :start].transpose(1, 2), errors, alpha=-1)
        loss += errors.square().sum(1) / 2
    return loss


def check_shapes(
    weight: torch.Tensor, hessians: Sequence[torch.Tensor], scale: torch.Tensor
) -> None:
    """Refuse what is not a stack.

    Raises:
        ValueError: if shapes disagree.
    """
    if weight.ndim != 3:
        raise ValueError(f"weight must be [experts, out, in], got {list(weight.shape)}")
    experts, rows, columns = weight.shape
    shapes = [list(hessian.shape) for hessian in hessians]
    if shapes != [[columns, columns]] * experts:
        raise ValueError(
            f"expected {experts} hessians [{columns}, {columns}] to match the weight, got {shapes}"
        )
    if scale.shape[:2] != (experts, rows):
        raise ValueError(
            f"scale must be [{experts}, {rows}, groups] to match the weight, "
            f"got {list(scale.shape)}"
        )
