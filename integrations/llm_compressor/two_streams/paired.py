"""Collect second moments together with what the 16-bit stream has for the same tokens."""

from __future__ import annotations

import torch
from torch import nn

from moeq_plugin.core.corrected_target import PairedMoments
from moeq_plugin.integrations.llm_compressor.calibration.observations import (
    Calibration,
    Observation,
)
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.integrations.llm_compressor.two_streams.counterpart import Counterpart


class PairedCalibration(Calibration):
    """Observes the linears of one stage, batch by batch, each of which the 16-bit stream has run.

    Args:
        counterpart: of the running batch.
        affinity_power: see :class:`Calibration`, likewise the others.
        weight_gate_proj: likewise.
        seed: likewise.
        padding: likewise.
    """

    def __init__(
        self,
        counterpart: Counterpart,
        *,
        affinity_power: float,
        weight_gate_proj: bool,
        seed: int,
        padding: PaddingWatch,
    ) -> None:
        super().__init__(
            affinity_power=affinity_power,
            weight_gate_proj=weight_gate_proj,
            seed=seed,
            padding=padding,
        )
        self._counterpart = counterpart

    def no_tokens(self, linear: nn.Linear, num_inputs: int, device: torch.device) -> PairedMoments:
        """Return moments of a linear that has seen no token."""
        channels = linear.out_features if self._counterpart.writes_residual else 0
        return PairedMoments.none(num_inputs, channels, device)

    def _open_experts(self, experts: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        super()._open_experts(experts, args)
        hidden_states, _, top_k_weights = args[:3]
        layer = self._positions[experts[0]].layer  # type: ignore[index]
        total = top_k_weights.sum(-1)
        if layer.shared_expert is not None:
            shared = layer.shared_weights(hidden_states.flatten(0, -2))
            total = total + (1 if shared is None else shared)
        self._counterpart.note_total(total)

    def _add(self, observation: Observation, inputs: torch.Tensor, power: float) -> None:
        super()._add(observation, inputs, power)
        moments, position = observation.moments, observation.position
        assert isinstance(moments, PairedMoments)
        tokens = None
        if position is not None and position.expert is not None:
            tokens, _ = self._dispatch[position.layer.experts][position.expert]
        theirs = self._counterpart.inputs(observation.linears[0], position, tokens)
        residual = self._counterpart.residual(position, tokens)
        rows, weights = self._weigh(inputs, position)
        if weights is not None:
            weights = weights.float().abs().pow(power)
        theirs, _ = self._weigh(theirs, position)
        if residual is not None:
            residual, _ = self._weigh(residual, position)
        moments.add_pairs(rows, theirs.float() - rows.float(), residual, weights)
