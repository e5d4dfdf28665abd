"""How far errors of experts that work on the same token add up beyond the sum of their losses.

With option ``x_e`` of expert ``e`` the loss of a layer is the quadratic form

    ``sum_ef Q[e, x_e, f, x_f]``,  ``Q[e, b, f, c] = sum_t <error_t(e, b), error_t(f, c)>``

over tokens ``t`` that reach both. Bit allocation keeps its diagonal only. Let ``R_ef`` be the
largest ``|correlation|`` of any option of ``e`` with any of ``f``, 1 on the diagonal, and
``lambda`` its largest eigenvalue. Then for *every* choice, with ``D`` the sum of the diagonal,
``(2 - lambda) * D <= loss <= lambda * D``: the choice that is best for ``D`` is within a factor
``lambda / (2 - lambda)`` of the best there is. No solver of quadratic problems is needed to know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Certificate:
    """What the correlations of one layer can change at most.

    Attributes:
        eigenvalue: ``lambda``, 1 where errors of different experts are orthogonal.
        factor: ``lambda / (2 - lambda)``, infinite from ``lambda = 2`` on: no guarantee.
        correlation: ``[experts, experts]`` float64, ``R``.
    """

    eigenvalue: float
    factor: float
    correlation: torch.Tensor


def accumulate_cross_terms(
    Q: torch.Tensor, errors: torch.Tensor, expert_index: torch.Tensor, *, chunk_size: int = 64
) -> None:
    """Add the inner products of one batch of errors to ``Q``, in place.

    Args:
        Q: ``[experts, options, experts, options]`` running sum, contiguous, best float64.
        errors: ``[tokens, slots, options, features]``, the output error of the expert in each
            slot at each option, times its router weight and the root of the sensitivity of each
            feature. Products are taken in the dtype of ``Q``.
        expert_index: ``[tokens, slots]`` int64, the expert in each slot.
        chunk_size: tokens at once; memory only.

    Raises:
        ValueError: if shapes disagree.
    """
    experts, options = Q.shape[:2]
    if errors.ndim != 4 or errors.shape[2] != options or errors.shape[:2] != expert_index.shape:
        raise ValueError(
            f"errors must be [tokens, slots, {options}, features] with expert_index "
            f"[tokens, slots], got {list(errors.shape)} and {list(expert_index.shape)}"
        )
    offset = torch.arange(options, device=Q.device)
    for some, index in zip(errors.split(chunk_size), expert_index.split(chunk_size), strict=True):
        vectors = some.flatten(1, 2).to(Q)  # [chunk, slots * options, features]
        row = (index.to(Q.device)[..., None] * options + offset).flatten(1)
        place = row[:, :, None] * (experts * options) + row[:, None]
        Q.view(-1).index_add_(0, place.flatten(), (vectors @ vectors.mT).flatten())


def coactivation(expert_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return ``[experts, experts]`` float64, the share of tokens routed to both experts.

    On the diagonal the share of tokens routed to the expert. Zero where there are no tokens.

    Example:
        >>> coactivation(torch.tensor([[0, 1], [1, 2]]), 3)
        tensor([[0.5000, 0.5000, 0.0000],
                [0.5000, 1.0000, 0.5000],
                [0.0000, 0.5000, 0.5000]], dtype=torch.float64)
    """
    is_routed = torch.zeros(
        len(expert_index), num_experts, dtype=torch.float64, device=expert_index.device
    ).scatter_(1, expert_index, 1.0)
    return is_routed.T @ is_routed / max(len(expert_index), 1)


def certificate(Q: torch.Tensor) -> Certificate:
    """Bound what correlations between experts can change, for all choices at once.

    Args:
        Q: ``[experts, options, experts, options]``, symmetric positive semidefinite. An option
            without error correlates with nothing.
    """
    size = Q.shape[0] * Q.shape[1]
    matrix = Q.double().reshape(size, size)
    diagonal = matrix.diagonal()
    inverse_root = torch.where(diagonal > 0, diagonal, math.inf).rsqrt()
    rho = (matrix * inverse_root[:, None] * inverse_root).abs().clamp(max=1)
    correlation = rho.view(Q.shape).amax((1, 3))
    correlation.fill_diagonal_(1)
    eigenvalue = float(torch.linalg.eigvalsh(correlation)[-1])
    factor = eigenvalue / (2 - eigenvalue) if eigenvalue < 2 else math.inf
    return Certificate(eigenvalue, factor, correlation)
