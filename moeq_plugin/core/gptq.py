"""GPTQ (arXiv:2210.17323) for a stack of weights of one shape, such as all experts of a layer.

Columns are rounded one after the other; what a column loses is passed on to the columns that
follow, along the rows of the upper Cholesky factor of the inverse Hessian. Same steps and
same order as the paper's reference, with these differences:

* All experts advance together, ``[experts, in, out]``: one column step is one batched operation.
* The factor comes from one Cholesky of the Hessian with both axes flipped and one triangular
  inverse, instead of Cholesky, inverse, Cholesky: fewer operations and smaller rounding errors.
* A dead input column (zero on the diagonal) keeps its weights, rounded to nearest. The reference
  sets them to zero, which silences a feature that the calibration data merely did not exercise.
* A Hessian that resists ten times the damping, three times over, falls back to nearest rounding
  and is reported.
"""

from __future__ import annotations

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
    hessian: torch.Tensor,
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
        hessian: ``[experts, in, in]`` second moments, overwritten. A positive factor per expert
            changes nothing.
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
    _check_shapes(weight, hessian, scale)
    num_columns = weight.shape[2]
    group = grid.group_of_column(num_columns).to(weight.device).expand(weight.shape[0], -1)
    hessian = _revive_dead_columns(hessian)
    W = weight.float()
    order = None
    if actorder:
        order = torch.argsort(hessian.diagonal(dim1=1, dim2=2), dim=1, descending=True)
        hessian = _permute(_permute(hessian, order, dim=1), order, dim=2)
        W, group = _permute(W, order, dim=2), group.gather(1, order)
    R, is_nearest = inverse_factor(hessian, dampening_frac)
    W = W.transpose(1, 2).contiguous()  # [experts, in, out]: a column is a contiguous row
    loss = _round_columns(W, R, scale, zero_point, group, grid, block_size)
    W = W.transpose(1, 2)
    if order is not None:
        W = _permute(W, order.argsort(dim=1), dim=2)
    return Solution(W.to(scale.dtype).contiguous(), loss, is_nearest)


def inverse_factor(
    hessian: torch.Tensor, dampening_frac: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the upper triangular ``R`` with ``inverse(damped hessian) = R.T @ R``.

    With ``J`` the flip of both axes and ``J H J = L L.T``, ``R = J inverse(L) J``.

    Args:
        hessian: ``[experts, in, in]``, symmetric with a positive diagonal; overwritten.
        dampening_frac: fraction of the mean diagonal that is added to the diagonal.

    Returns:
        ``[experts, in, in]``, and ``[experts]`` bool that is true where no damping tried made the
        Hessian positive definite; the factor there is the identity, which rounds to nearest.
    """
    flipped = hessian.flip(1, 2)
    diagonal = flipped.diagonal(dim1=1, dim2=2)
    damping = dampening_frac * diagonal.mean(1, keepdim=True)
    diagonal += damping
    L, info = torch.linalg.cholesky_ex(flipped)
    for attempt in range(1, _DAMPING_ATTEMPTS):
        failed = info.nonzero().flatten()
        if not len(failed):
            break
        # the damping already there is raised to ten times the last one
        diagonal[failed] += damping[failed] * (9 * 10 ** (attempt - 1))
        L[failed], info[failed] = torch.linalg.cholesky_ex(flipped[failed])
    is_nearest = info != 0
    identity = torch.eye(hessian.shape[1], dtype=hessian.dtype, device=hessian.device)
    L[is_nearest] = identity
    R = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)
    return R.flip(1, 2), is_nearest


def _round_columns(
    W: torch.Tensor,
    R: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    group: torch.Tensor,
    grid: Grid,
    block_size: int,
) -> torch.Tensor:
    """Replace the columns of ``W`` ``[experts, in, out]`` by grid points; return the losses."""
    num_columns = W.shape[1]
    loss = W.new_zeros(W.shape[0], W.shape[2])
    for start in range(0, num_columns, block_size):
        end = min(start + block_size, num_columns)
        block = W[:, start:end]  # a view: rounding it in place is the result
        errors = torch.empty_like(block)
        columns = group[:, None, start:end].expand(-1, scale.shape[1], -1)
        scales = scale.gather(2, columns).transpose(1, 2).contiguous()  # [experts, block, out]
        zeros = zero_point.gather(2, columns).transpose(1, 2).to(W.dtype).contiguous()
        factor = R[:, start:end, start:end]
        diagonal = factor.diagonal(dim1=1, dim2=2)[..., None]
        for i in range(end - start):
            column = block[:, i]
            codes = nearest_code(column, scales[:, i], zeros[:, i], grid)
            rounded = point_of_code(codes, scales[:, i], zeros[:, i]).to(W.dtype)
            errors[:, i] = (column - rounded) / diagonal[:, i]
            block[:, i] = rounded
            block[:, i + 1 :].baddbmm_(factor[:, i, i + 1 :, None], errors[:, i : i + 1], alpha=-1)
        W[:, end:].baddbmm_(R[:, start:end, end:].transpose(1, 2), errors, alpha=-1)
        loss += errors.square().sum(1) / 2
    return loss


def _revive_dead_columns(hessian: torch.Tensor) -> torch.Tensor:
    """Give columns that saw only zeros the mean diagonal, so that they neither fail nor vanish."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    dead = diagonal <= 0
    if dead.any():
        alive = (~dead).sum(1, keepdim=True).clamp(min=1)
        mean = diagonal.clamp(min=0).sum(1, keepdim=True) / alive
        stand_in = torch.where(mean > 0, mean, torch.ones_like(mean)).expand_as(diagonal)
        diagonal[dead] = stand_in[dead]
    return hessian


def _permute(stack: torch.Tensor, order: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Reorder one axis of ``[experts, a, b]`` by each expert's own ``order``."""
    index = order[:, None, :] if dim == 2 else order[:, :, None]
    return stack.gather(dim, index.expand_as(stack))


def _check_shapes(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor) -> None:
    if weight.ndim != 3:
        raise ValueError(f"weight must be [experts, out, in], got {list(weight.shape)}")
    experts, rows, columns = weight.shape
    if hessian.shape != (experts, columns, columns):
        raise ValueError(
            f"hessian must be [{experts}, {columns}, {columns}] to match the weight, "
            f"got {list(hessian.shape)}"
        )
    if scale.shape[:2] != (experts, rows):
        raise ValueError(
            f"scale must be [{experts}, {rows}, groups] to match the weight, "
            f"got {list(scale.shape)}"
        )
