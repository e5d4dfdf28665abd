"""Second moments of layer inputs, the only calibration statistic GPTQ needs.

Quantizing ``weight`` to ``quantized`` changes the output of token ``t`` by
``(weight - quantized) @ inputs[t]``. Summed over tokens with weights ``a_t`` the squared change is
``trace(D @ H @ D.T) / 2`` with ``D = weight - quantized`` and
``H = 2 * sum_t a_t * outer(inputs[t], inputs[t])``. GPTQ (arXiv:2210.17323) has ``a_t = 1``;
AGQ (arXiv:2505.03804, Eq. 18) takes ``a_t`` from the router. This module does not know experts:
who weights which token is decided by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def accumulate_hessian(
    hessian: torch.Tensor, inputs: torch.Tensor, token_weights: torch.Tensor | None = None
) -> None:
    """Add one batch of layer inputs to ``hessian``, in place.

    The sum is not divided by the token count: GPTQ's solution does not change when its Hessian is
    multiplied by a positive constant, and a plain sum can be split over batches and ranks.

    Args:
        hessian: ``[in, in]`` float32 or float64 running sum, modified in place.
        inputs: ``[tokens, in]`` inputs of the layer, any float dtype; zero tokens are allowed.
        token_weights: ``[tokens]`` non-negative weight of each token, such as the router's
            combine weight for this expert. ``None`` means 1 for every token.

    Raises:
        ValueError: if shapes disagree or a weight is negative.

    Example:
        >>> hessian = torch.zeros(2, 2)
        >>> accumulate_hessian(hessian, torch.tensor([[1.0, 2.0]]), torch.tensor([0.5]))
        >>> hessian
        tensor([[1., 2.],
                [2., 4.]])
    """
    if inputs.ndim != 2 or inputs.shape[1] != hessian.shape[0]:
        raise ValueError(
            f"inputs must be [tokens, {hessian.shape[0]}] to match the hessian, "
            f"got {list(inputs.shape)}; flatten batch and sequence first"
        )
    inputs = inputs.to(hessian.dtype)
    if token_weights is None:
        hessian.addmm_(inputs.T, inputs, alpha=2)
        return
    if token_weights.shape != inputs.shape[:1]:
        raise ValueError(
            f"token_weights must be [{inputs.shape[0]}], got {list(token_weights.shape)}"
        )
    if (token_weights < 0).any():
        raise ValueError(f"token_weights must be >= 0, got a minimum of {token_weights.min():.3g}")
    hessian.addmm_(inputs.T * token_weights.to(hessian.dtype), inputs, alpha=2)


@dataclass
class SecondMoments:
    """A running Hessian together with what is needed to judge how far to trust it.

    Attributes:
        hessian: ``[in, in]`` float32, ``2 * sum_t a_t * outer(x_t, x_t)``.
        weight_sum: ``[]`` float64, ``sum_t a_t``.
        weight_square_sum: ``[]`` float64, ``sum_t a_t ** 2``.
        peak_square_sum: ``[]`` float64, ``sum_t a_t max_j x_tj ** 2``, from which follows what
            rounding the inputs of each token costs.
    """

    hessian: torch.Tensor
    weight_sum: torch.Tensor
    weight_square_sum: torch.Tensor
    peak_square_sum: torch.Tensor

    @classmethod
    def zeros(cls, num_inputs: int, device: torch.device | str = "cpu") -> SecondMoments:
        """Return moments that have seen no token, for ``num_inputs`` input features."""
        sums = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
        return cls(torch.zeros(num_inputs, num_inputs, device=device), *sums)

    def add(self, inputs: torch.Tensor, token_weights: torch.Tensor | None = None) -> None:
        """Add one batch, in place; shapes and errors as in :func:`accumulate_hessian`."""
        accumulate_hessian(self.hessian, inputs, token_weights)
        peaks = inputs.abs().amax(1).double().square()
        if token_weights is None:
            self.weight_sum += inputs.shape[0]
            self.weight_square_sum += inputs.shape[0]
            self.peak_square_sum += peaks.sum()
        else:
            weights = token_weights.double()
            self.weight_sum += weights.sum()
            self.weight_square_sum += weights.square().sum()
            self.peak_square_sum += weights @ peaks

    @property
    def effective_tokens(self) -> float:
        """Return Kish's effective sample size ``(sum a)^2 / sum a^2``, 0 without tokens.

        It equals the token count when all weights are equal and is smaller otherwise: one token
        with almost all of the weight counts as one token, however many others there are.
        """
        square_sum = self.weight_square_sum.item()
        return self.weight_sum.item() ** 2 / square_sum if square_sum > 0 else 0.0

    def mean(self) -> torch.Tensor:
        """Return ``hessian / weight_sum``, ``[in, in]``; zeros without tokens."""
        if self.weight_sum == 0:
            return torch.zeros_like(self.hessian)
        return self.hessian / self.weight_sum.to(self.hessian.dtype)


def shrink_toward(
    moments: SecondMoments,
    layer_moments: SecondMoments,
    *,
    min_effective_tokens: float,
    shrinkage: float = 1.0,
) -> torch.Tensor:
    """Return a Hessian in which the layer stands in for the tokens an expert has not seen.

    With ``n`` effective tokens, ``m = shrinkage * (min_effective_tokens - n)`` missing ones and
    the mean second moments ``S_e`` of the expert and ``S_l`` of the layer, the result is
    ``(n * S_e + m * S_l) / (n + m)``: continuous at the threshold, the expert's own above it, the
    layer's when the expert saw nothing. MoEQuant (arXiv:2505.03804) has no such guard: there a
    never-routed expert has H = 0 and GPTQ sets all its weights to zero.

    Args:
        moments: what the expert's own tokens gave.
        layer_moments: what a sample of all tokens of the layer gives for the same linear.
        min_effective_tokens: threshold below which the layer is mixed in.
        shrinkage: 0 borrows only when the expert has seen nothing at all; 1 fills up to the
            threshold; larger values trust the expert less.

    Returns:
        ``[in, in]`` Hessian; its scale is that of a mean, which GPTQ does not care about.
    """
    own = own_share(moments, min_effective_tokens=min_effective_tokens, shrinkage=shrinkage)
    if own == 0:
        return layer_moments.mean()
    if own == 1 or layer_moments.effective_tokens == 0:
        return moments.mean()
    mixed = moments.hessian * (own / moments.weight_sum.item())
    layer_share = (1 - own) / layer_moments.weight_sum.item()
    return mixed.add_(layer_moments.hessian, alpha=layer_share)


def with_white_noise(hessian: torch.Tensor, share: float) -> torch.Tensor:
    """Return second moments as if white noise of ``share`` times their mean power had joined them.

    Args:
        hessian: ``[in, in]``, symmetric; not modified.
        share: of the mean second moment, added to each of them; 0 returns ``hessian`` itself.
    """
    if share == 0:
        return hessian
    noisy = hessian.clone()
    diagonal = noisy.diagonal()
    diagonal += share * diagonal.mean()
    return noisy


def own_share(
    moments: SecondMoments, *, min_effective_tokens: float, shrinkage: float = 1.0
) -> float:
    """Return ``n / (n + m)`` of :func:`shrink_toward`, whose arguments these are."""
    effective = moments.effective_tokens
    missing = shrinkage * max(0.0, min_effective_tokens - effective)
    return effective / (effective + missing) if effective > 0 else 0.0
