"""The loss that AWQ chooses scales by, for tokens that do not all count alike.

AWQ (arXiv:2306.00978) tries scales ``s`` and keeps those with the least
``sum_t a_t ||Q(W diag(s)) (x_t / s) - W x_t||^2``, with all ``a_t = 1``; MoEQuant+
(arXiv:2505.03804, Eq. 18) takes ``a_t`` from the router. Tokens enter that loss through their
second moments alone, so nothing else has to be kept of them.
"""

from __future__ import annotations

import torch

from moeq_plugin.core.sensitivity import quadratic_losses


def mean_output_loss(change: torch.Tensor, hessian: torch.Tensor, weight_sum: float) -> float:
    """Return ``sum_t a_t ||change @ x_t||^2 / (out * sum_t a_t)``, a mean over tokens and outputs.

    Args:
        change: ``[out, in]`` difference of two weights.
        hessian: ``[in, in]``, ``2 * sum_t a_t * outer(x_t, x_t)``.
        weight_sum: ``sum_t a_t``, positive.

    Raises:
        ValueError: if ``weight_sum`` is not positive: no token says nothing about scales.

    Example:
        >>> hessian = torch.tensor([[2.0, 0.0], [0.0, 8.0]])  # (1, 0) and (0, 2), weights 1
        >>> mean_output_loss(torch.tensor([[3.0, 1.0]]), hessian, weight_sum=2.0)
        6.5
    """
    if weight_sum <= 0:
        raise ValueError(f"weight_sum must be positive, got {weight_sum}")
    halves = quadratic_losses(change.float(), hessian.float())  # of the hessian's factor 2
    return halves.sum().item() / (weight_sum * len(change))
