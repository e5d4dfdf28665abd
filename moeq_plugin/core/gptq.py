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

from moeq_plugin.core.grid import Grid, nearest_code, point_of_code

_DAMPING_ATTEMPTS = 4  # each ten times the one before


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
    _check_shapes(weight, hessians, scale)
    diagonal = torch.stack([revive_dead_columns(hessian) for hessian in hessians])
    if actorder:
        order = diagonal.argsort(dim=1)  # ascending, since columns are processed from the end
    else:
        order = torch.arange(weight.shape[2] - 1, -1, -1, device=weight.device)
        order = order.expand(len(weight), -1)
    factor, is_nearest = inverse_factor(hessians, order, dampening_frac)
    W = torch.stack([w.index_select(1, o).T for w, o in zip(weight, order, strict=True)]).float()
    group = grid.group_of_column(weight.shape[2]).to(weight.device)[order]
    loss = _round_columns(W, factor, scale, zero_point, group, grid, block_size)
    result = torch.empty(weight.shape, dtype=scale.dtype, device=weight.device)
    for rounded, w, o in zip(result, W, order.argsort(dim=1), strict=True):
        rounded.copy_(w.index_select(0, o).T)
    return Solution(result, loss, is_nearest)


def inverse_factor(
    hessians: Sequence[torch.Tensor], order: torch.Tensor, dampening_frac: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lower triangular ``F`` with ``inverse(damped H[order, order]) = F.T @ F``.

    Args:
        hessians: for each expert ``[in, in]``, symmetric with a positive diagonal.
        order: ``[experts, in]``, the order of rows and columns in the result.
        dampening_frac: fraction of the mean diagonal that is added to the diagonal.

    Returns:
        ``[experts, in, in]``, and ``[experts]`` bool that is true where no damping tried made the
        Hessian positive definite; the factor there is the identity, which rounds to nearest.
    """

    def damped(e: int, attempt: int) -> torch.Tensor:
        ordered = hessians[e].index_select(0, order[e]).index_select(1, order[e]).float()
        diagonal = ordered.diagonal()
        diagonal += dampening_frac * 10**attempt * diagonal.mean()
        return ordered

    L = torch.stack([damped(e, 0) for e in range(len(hessians))])
    info = torch.empty(len(hessians), dtype=torch.int32, device=L.device)
    torch.linalg.cholesky_ex(L, out=(L, info))
    for attempt in range(1, _DAMPING_ATTEMPTS):
        for e in info.nonzero().flatten().tolist():
            L[e], info[e] = torch.linalg.cholesky_ex(damped(e, attempt))
    is_nearest = info != 0
    identity = torch.eye(L.shape[1], dtype=L.dtype, device=L.device)
    L[is_nearest] = identity
    return torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False), is_nearest


def _round_columns(
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


def revive_dead_columns(hessian: torch.Tensor) -> torch.Tensor:
    """Give columns that saw only zeros the mean diagonal, in place; return the diagonal."""
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if dead.any():
        alive = diagonal[~dead]
        diagonal[dead] = alive.mean() if len(alive) else 1.0
    return diagonal


def _check_shapes(
    weight: torch.Tensor, hessians: Sequence[torch.Tensor], scale: torch.Tensor
) -> None:
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
