"""Damp, order and factorize second moments for solvers that go column by column.

Columns are stored last first and processed from the end. Then the triangular factor of the inverse
along which errors are passed on is the inverse of the Hessian's own Cholesky factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_DAMPING_ATTEMPTS = 4  # each ten times the one before
_SMALL_TRIANGLE = 1024  # columns, which are inverted at once


@dataclass(frozen=True)
class Factorization:
    """In which order columns are rounded, and how they pass on what they lose.

    Attributes:
        order: ``[experts, in]``; columns are processed from its end.
        factor: ``[experts, in, in]``, see :func:`inverse_factor`.
        is_nearest: ``[experts]`` bool, true where the factor is the identity.
    """

    order: torch.Tensor
    factor: torch.Tensor
    is_nearest: torch.Tensor

    def damped(self, hessians: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the ``[experts, in, in]`` float32 Hessians that were factorized, in given order.

        Where nothing could be factorized it is the identity, as the factor is.
        """
        damped = torch.stack([hessian.float() for hessian in hessians])
        diagonal = damped.diagonal(dim1=1, dim2=2)
        # the first entry of a Cholesky factor is the root of the first damped second moment
        first = self.factor[:, 0, 0].square().reciprocal()
        added = first - diagonal.gather(1, self.order[:, :1])[:, 0]
        diagonal += added[:, None]
        damped[self.is_nearest] = torch.eye(damped.shape[1], device=damped.device)
        return damped


def factorize(
    hessians: Sequence[torch.Tensor], *, dampening_frac: float, actorder: bool
) -> Factorization:
    """Order and factorize; arguments as of :func:`solve`."""
    diagonal = torch.stack([revive_dead_columns(hessian) for hessian in hessians])
    if actorder:
        order = diagonal.argsort(dim=1)  # ascending, since columns are processed from the end
    else:
        order = torch.arange(diagonal.shape[1] - 1, -1, -1, device=diagonal.device)
        order = order.expand(len(diagonal), -1)
    factor, is_nearest = inverse_factor(hessians, order, dampening_frac)
    return Factorization(order, factor, is_nearest)


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
    L[is_nearest] = torch.eye(L.shape[1], dtype=L.dtype, device=L.device)
    return _inverse(L), is_nearest


def _inverse(lower: torch.Tensor) -> torch.Tensor:
    """Return the inverse of each lower triangle of ``[experts, n, n]``.

    By halves, which are triangles again: a solver that is given the identity works on its zeros.
    """
    num_columns = lower.shape[1]
    if num_columns <= _SMALL_TRIANGLE:
        identity = torch.eye(num_columns, dtype=lower.dtype, device=lower.device)
        whole: torch.Tensor = torch.linalg.solve_triangular(
            lower, identity.expand_as(lower), upper=False
        )
        return whole
    half = num_columns // 2
    inverse = torch.zeros_like(lower)
    inverse[:, :half, :half] = first = _inverse(lower[:, :half, :half])
    inverse[:, half:, half:] = second = _inverse(lower[:, half:, half:])
    inverse[:, half:, :half] = (second @ (lower[:, half:, :half] @ first)).neg_()
    return inverse


def revive_dead_columns(hessian: torch.Tensor) -> torch.Tensor:
    """Give columns that saw only zeros the mean diagonal, in place; return the diagonal."""
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    if dead.any():
        alive = diagonal[~dead]
        diagonal[dead] = alive.mean() if len(alive) else 1.0
    return diagonal
