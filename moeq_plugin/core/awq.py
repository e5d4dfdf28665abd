"""Inputs that stand for all tokens of a linear in AWQ's search for scales.

AWQ (arXiv:2306.00978) tries scales ``s`` and keeps those with the least
``sum_t a_t ||Q(W diag(s)) (x_t / s) - W x_t||^2``; MoEQuant+ (arXiv:2505.03804, Eq. 18) takes
``a_t`` from the router. Tokens enter that loss through second moments alone, so as many rows as
there are features do the work of all tokens, weights included.
"""

from __future__ import annotations

import torch


def representative_inputs(hessian: torch.Tensor, weight_sum: float) -> torch.Tensor:
    """Return ``[in, in]`` float32 rows whose mean squared output change is the weighted one.

    For every change ``D`` of a weight, ``||D @ rows.T||^2 / in`` equals
    ``sum_t a_t ||D @ x_t||^2 / sum_t a_t``: the rows are the symmetric root of the second moments.

    Args:
        hessian: ``[in, in]``, ``2 * sum_t a_t * outer(x_t, x_t)``.
        weight_sum: ``sum_t a_t``, positive.

    Raises:
        ValueError: if ``weight_sum`` is not positive: no token says nothing about scales.

    Example:
        >>> representative_inputs(torch.tensor([[2.0, 0.0], [0.0, 8.0]]), weight_sum=2.0)
        tensor([[1., 0.],
                [0., 2.]])
    """
    if weight_sum <= 0:
        raise ValueError(f"weight_sum must be positive, got {weight_sum}")
    # in float64: the root of a value lost to rounding would be far from lost
    values, vectors = torch.linalg.eigh(hessian.double())
    root = (values.clamp(min=0) * (len(hessian) / (2 * weight_sum))).sqrt()
    rows: torch.Tensor = (vectors * root) @ vectors.T
    return rows.float()
