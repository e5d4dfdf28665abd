"""Weights that make up for what was rounded before them.

A linear of a model that is quantized layer by layer receives ``x`` where the 16-bit model has
``x~``, and what it puts out is added to a residual stream that is off by ``r`` as well. The weights
``W* = W + C (H + ridge)^-1`` with ``C = 2 sum_t a_t (W (x~_t - x_t) + r_t) x_t^T`` and
``H = 2 sum_t a_t x_t x_t^T`` minimise ``sum_t a_t |W x~_t + r_t - W* x_t|^2`` over the tokens, plus
a ridge on what is changed (GPTAQ, arXiv:2504.02692). They are what is rounded then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeq_plugin.core.hessian import SecondMoments

_RIDGE = 0.05  # of the mean diagonal


@dataclass
class PairedMoments(SecondMoments):
    """Second moments of a linear's inputs, and how they go with those of the 16-bit stream.

    All of it is sums over tokens, which can be split over batches and ranks.

    Attributes:
        cross: ``[in, in]`` float32, ``2 * sum_t a_t * outer(x~_t - x_t, x_t)``.
        residual: ``[out, in]`` float32, ``2 * sum_t a_t * outer(r_t, x_t)``; ``[0, in]`` for
            linears that do not write to the residual stream.
    """

    cross: torch.Tensor
    residual: torch.Tensor

    @classmethod
    def none(
        cls, num_inputs: int, num_residual: int, device: torch.device | str = "cpu"
    ) -> PairedMoments:
        """Return moments that have seen no token.

        Args:
            num_inputs: features of the inputs.
            num_residual: channels of the residual stream, 0 for a linear that does not write to it.
            device: of the sums.
        """
        sums = vars(SecondMoments.zeros(num_inputs, device))
        cross = torch.zeros(num_inputs, num_inputs, device=device)
        return cls(**sums, cross=cross, residual=cross.new_zeros(num_residual, num_inputs))

    def add_pairs(
        self,
        inputs: torch.Tensor,
        change: torch.Tensor,
        residual: torch.Tensor | None,
        token_weights: torch.Tensor | None,
    ) -> None:
        """Add what the 16-bit stream has more, for tokens of which :meth:`add` gets the inputs.

        Args:
            inputs: ``[tokens, in]``, ``x``.
            change: ``[tokens, in]``, ``x~ - x`` of the same tokens.
            residual: ``[tokens, out]``, ``r``; ``None`` where there is none.
            token_weights: ``[tokens]``; ``None`` means 1 for every token.
        """
        weighted = inputs.to(self.cross.dtype)
        if token_weights is not None:
            weighted = weighted * token_weights.to(weighted.dtype)[:, None]
        self.cross.addmm_(change.to(weighted.dtype).T, weighted, alpha=2)
        if residual is not None:
            self.residual.addmm_(residual.to(weighted.dtype).T, weighted, alpha=2)


def corrected(
    weight: torch.Tensor, hessian: torch.Tensor, moments: PairedMoments, share: float = 1.0
) -> torch.Tensor:
    """Return ``[out, in]`` weights that lose least against the 16-bit stream.

    On the tokens that ``hessian`` and ``moments`` are sums over, their loss is never larger than
    that of ``weight``.

    Args:
        weight: ``[out, in]``.
        hessian: ``[in, in]``; may hold further second moments, of tokens that need no correction.
        moments: of the tokens that do.
        share: what the moments' own Hessian has been multiplied with within ``hessian``.
    """
    wide = weight.to(hessian.dtype)
    wanted = wide @ moments.cross
    if len(moments.residual):
        wanted += moments.residual
    diagonal = hessian.diagonal()
    damped = hessian + torch.diag_embed((_RIDGE * diagonal.mean()).expand_as(diagonal))
    factor, info = torch.linalg.cholesky_ex(damped)
    if share == 0 or info.item() != 0:
        return wide  # no token, or none that is not zero: nothing to make up for
    return wide + torch.cholesky_solve(share * wanted.T, factor).T
