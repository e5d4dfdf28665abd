"""Second moments of the two halves of a calibration set: one rounds, the other judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moeq_plugin.integrations.llm_compressor.allocation.domains import Domains
from moeq_plugin.integrations.llm_compressor.allocation.held_out_loss import HeldOutLoss
from moeq_plugin.integrations.llm_compressor.calibration import rank_moments, ranks
from moeq_plugin.integrations.llm_compressor.calibration.data_split import Part
from moeq_plugin.integrations.llm_compressor.calibration.observations import (
    Calibration,
    RegisterHook,
)
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.models.moe import MoELayer

# errors of an expert's output reach the block's output times the combine weight, and losses are
# squares of errors
_JUDGING_POWER = 2.0


@dataclass(frozen=True)
class _HeldOut:
    """The half of a domain that judges."""

    part: Part
    calibration: Calibration


class Halves:
    """What both halves give of the layer that is running.

    Args:
        watch: hears of the batches.
        domains: that there are; each is halved by itself.
        names: the linears and their names.
        affinity_power: of the half that rounds, as for quantization.
        weight_gate_proj: as for quantization.
        seed: of the token samples.

    Attributes:
        domains: as given.
        rounding: what rounds, with tokens of all domains.
    """

    def __init__(
        self,
        watch: PaddingWatch,
        domains: Domains,
        names: Mapping[nn.Linear, str],
        *,
        affinity_power: float,
        weight_gate_proj: bool,
        seed: int,
    ) -> None:
        def calibration(part: Part, power: float) -> Calibration:
            return Calibration(
                affinity_power=power, weight_gate_proj=weight_gate_proj, seed=seed, padding=part
            )

        self.domains = domains
        self.rounding = calibration(Part(watch, half=0, before=domains.before), affinity_power)
        self._names: dict[nn.Module, str] = dict(names.items())
        parts = [
            Part(watch, half=1, domain=number, before=domains.before) for number in domains.numbers
        ]
        self._held_out = [_HeldOut(part, calibration(part, _JUDGING_POWER)) for part in parts]

    def attach(
        self,
        model: nn.Module,
        layers: list[MoELayer],
        linears: list[nn.Linear],
        register_hook: RegisterHook,
    ) -> None:
        """Register the hooks that accumulate second moments.

        Args:
            model: the model that will run.
            layers: its MoE layers.
            linears: which of the linears to observe.
            register_hook: the host's ``Modifier.register_hook``.
        """
        for calibration in self._calibrations():
            calibration.attach(model, layers, linears, register_hook)

    def share_out(self) -> dict[str, int]:
        """Add up what all ranks have seen; return which of them rounds and judges each linear."""
        for calibration in self._calibrations():
            rank_moments.sum_over_ranks(calibration, self._names)
        return rank_moments.keep_own_share(self.rounding, self._names)  # what judges stays whole

    def held_out_losses(
        self, row_weights: Mapping[nn.Linear, torch.Tensor] | None
    ) -> list[HeldOutLoss]:
        """Return what judges the running layer, for each domain; all ranks ask together.

        Args:
            row_weights: see :class:`HeldOutLoss`.
        """
        return [
            HeldOutLoss(
                held_out.calibration,
                sum(ranks.gather(held_out.part.num_tokens)),
                self._names,
                row_weights,
            )
            for held_out in self._held_out
        ]

    @property
    def first_judging(self) -> Calibration:
        """Return what judges the first domain, the only one without a column ``domain``."""
        return self._held_out[0].calibration

    def clear_layer(self) -> None:
        """Drop what belongs to the layer that has just been judged."""
        for calibration in self._calibrations():
            calibration.clear_layer()

    def _calibrations(self) -> list[Calibration]:
        return [self.rounding, *(held_out.calibration for held_out in self._held_out)]
