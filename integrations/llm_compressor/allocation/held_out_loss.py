"""What errors of weights cost on held-out tokens of one layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from moeq_plugin.core.names import pool_of
from moeq_plugin.core.sensitivity import quadratic_losses, smoothed_shares
from moeq_plugin.integrations.llm_compressor.allocation.options import Option
from moeq_plugin.integrations.llm_compressor.calibration.guard import guard
from moeq_plugin.integrations.llm_compressor.calibration.observations import (
    Calibration,
    Observation,
)


class HeldOutLoss:
    """Judges rounded weights by one part of the calibration tokens.

    Args:
        calibration: what these tokens gave, weighted by the squared combine weight.
        num_tokens: how many there are.
        names: the linears and their names.
        row_weights: ``[out]`` mean squared gradients of each linear. ``None`` to judge by what is
            added to the residual stream: the relative error of all linears of one role in the
            layer, times the energy that the last linear of their block puts out.
    """

    def __init__(
        self,
        calibration: Calibration,
        num_tokens: int,
        names: Mapping[nn.Module, str],
        row_weights: Mapping[nn.Linear, torch.Tensor] | None,
    ) -> None:
        self._calibration = calibration
        self._row_weights = row_weights
        self._observations = {
            linear: observation
            for observation in calibration.observations.values()
            for linear in observation.linears
        }
        self._moments: dict[int, torch.Tensor] = {}  # by identity: siblings share an observation
        pools: dict[str, list[nn.Linear]] = {}
        for linear in self._observations:
            pools.setdefault(pool_of(names[linear]), []).append(linear)
        self._shares: dict[nn.Linear, float] = {}
        self._norms: dict[nn.Linear, float] = {}
        for pool in pools.values():
            weights = torch.stack([self._observations[m].moments.weight_sum for m in pool])
            # experts of one role share out the tokens, and one may have got none by chance
            shares = smoothed_shares(weights, num_tokens) if len(pool) > 1 else weights / num_tokens
            self._shares.update(zip(pool, shares.tolist(), strict=True))
        if row_weights is None:
            self._set_norms(pools)

    def loss(self, linear: nn.Linear, difference: torch.Tensor, option: Option) -> float:
        """Return nats per token (squared error without gradients) of one rounded weight.

        Args:
            linear: with its original weight.
            difference: ``[out, in]``, what rounding changes.
            option: what it is rounded to, for what rounding of activations adds.
        """
        error = self._error(linear, difference)
        args = option.scheme.input_activations if option.scheme is not None else None
        if args is not None:
            # taken to be independent of the error of the weight, so that the squares add up
            error += self._activation_error(linear, 2**args.num_bits - 1)
        return error / self._norms.get(linear, 1.0)

    def _set_norms(self, pools: dict[str, list[nn.Linear]]) -> None:
        energies = {
            name: sum(self._error(linear, linear.weight.float()) for linear in pool)
            for name, pool in pools.items()
        }
        # pools are in the order of their first call, so the last of a block is its output
        of_block = {name.rpartition(".")[0]: energy for name, energy in energies.items()}
        for name, pool in pools.items():
            scale = of_block[name.rpartition(".")[0]]
            norm = energies[name] / scale if energies[name] > 0 and scale > 0 else 1.0
            self._norms.update(dict.fromkeys(pool, norm))

    def _error(self, linear: nn.Linear, difference: torch.Tensor) -> float:
        weights = None if self._row_weights is None else self._row_weights[linear]
        losses = quadratic_losses(difference, self._moment(self._observations[linear]), weights)
        return self._shares[linear] * float(losses.sum())

    def _activation_error(self, linear: nn.Linear, steps: int) -> float:
        """Return the cost of rounding each token to ``steps`` even steps over its range."""
        moments = self._observations[linear].moments
        if moments.weight_sum == 0:
            return 0.0
        peak_square = moments.peak_square_sum / moments.weight_sum
        noise = (4 / steps**2 / 12) * peak_square.float()  # variance of rounding, per input
        weight = linear.weight.float()
        weights = None if self._row_weights is None else self._row_weights[linear]
        losses = quadratic_losses(weight * noise.sqrt(), torch.eye(weight.shape[1]), weights)
        return self._shares[linear] * float(losses.sum())

    def _moment(self, observation: Observation) -> torch.Tensor:
        """Return ``E[x x^T]``, the layer's in the place of tokens that an expert has not seen."""
        key = id(observation)
        if key not in self._moments:
            hessian, weight_sum, _ = guard(
                observation, self._calibration, min_effective_tokens=None, shrinkage=1.0
            )
            self._moments[key] = hessian / (2 * weight_sum) if weight_sum else hessian
        return self._moments[key]
