"""Measure what every linear loses at every option, in the host's layer-by-layer pass.

Each layer is rounded to each option by the quantizer that ships, with the second moments of one
half of the calibration sequences, and judged with those of the other half. The model is not
changed: every layer hands on what it computes with its original weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from moeq_plugin.core.sensitivity import SensitivityTable
from moeq_plugin.integrations.llm_compressor import preflight
from moeq_plugin.integrations.llm_compressor.allocation.choices import Choices
from moeq_plugin.integrations.llm_compressor.allocation.domains import Domains
from moeq_plugin.integrations.llm_compressor.allocation.halves import Halves
from moeq_plugin.integrations.llm_compressor.allocation.interactions import Interactions
from moeq_plugin.integrations.llm_compressor.allocation.kept_measurements import (
    KeptMeasurements,
)
from moeq_plugin.integrations.llm_compressor.allocation.measurement import Measurement
from moeq_plugin.integrations.llm_compressor.allocation.options import DEFAULT_OPTIONS
from moeq_plugin.integrations.llm_compressor.allocation.row_weights import measure_row_weights
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity_config import SensitivityConfig
from moeq_plugin.integrations.llm_compressor.allocation.trial_rounding import TrialRounding
from moeq_plugin.integrations.llm_compressor.calibration.output_moments import OutputMoments
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.integrations.llm_compressor.host import (
    listen_to_batches,
    run_pass,
    run_routed_tokens_only,
    undo_with_oneshot,
)
from moeq_plugin.integrations.llm_compressor.one_run import OneRun
from moeq_plugin.integrations.llm_compressor.solver_fields import SolverFields
from moeq_plugin.models.linear_experts import linear_moe_layers
from moeq_plugin.models.moe import MoELayer
from moeq_plugin.records.progress import layer_progress, report_progress


class SensitivityModifier(SolverFields, OneRun, Modifier):
    """Measure a :class:`moeq_plugin.SensitivityTable`; nothing is quantized.

    The loss of linear ``l`` at option ``b`` is ``E[g^2 . (dW_b x)^2] / 2`` in nats per token:
    ``dW_b`` what MoEQuant's rounding to ``b`` changes, ``x`` the inputs of held-out tokens
    weighted by the squared combine weight, ``g`` the gradient of the model's own log-likelihood
    at the output. Losses of several linears add up.

    MoQa (arXiv:2503.21135) names the stages and gives no formula that can be computed; this is
    the sum of squares that GEMQ (arXiv:2605.23078) uses at block outputs, with the error of the
    quantizer that ships in place of rounding to nearest.

    Lifecycle:

    - on_initialize: check options and targets
    - on_calibration_start: one backward pass per batch for ``g``; hooks for second moments
    - on_sequential_epoch_end: round and judge one layer at every option
    - on_calibration_end: put the table together

    Args:
        options: schemes to choose from.
        targets: as for quantization.
        ignore: as for quantization.
        config: how to measure.
        affinity_power: as for quantization.
        weight_gate_proj: as for quantization.
        min_effective_tokens: as for quantization.
        shrinkage: as for quantization.
        seed: of samples and draws.
        weight_observer: as for quantization.
        refine_steps: of codebooks, as for quantization.

    How trials are rounded is said by the arguments of :class:`SolverFields`.
    """

    options: list[str] = Field(default_factory=lambda: list(DEFAULT_OPTIONS))
    targets: list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=list)
    config: SensitivityConfig = Field(default_factory=SensitivityConfig)
    affinity_power: float = Field(default=1.0, ge=0)
    weight_gate_proj: bool = True
    min_effective_tokens: float | None = Field(default=None, ge=0)
    shrinkage: float = Field(default=1.0, ge=0)
    seed: int = 0
    weight_observer: str | None = None
    refine_steps: int = Field(default=8, ge=0)
    requires_calibration_data: bool = True

    # the host tells of each phase, in this order; what a phase needs was made by the one before
    _layers: list[MoELayer] = PrivateAttr()
    _choices: Choices = PrivateAttr()
    _measurement: Measurement = PrivateAttr()
    _table: SensitivityTable | None = PrivateAttr(default=None)
    _kept: KeptMeasurements | None = PrivateAttr(default=None)  # None to keep nothing
    _undo: ExitStack = PrivateAttr(default_factory=ExitStack)

    @property
    def table(self) -> SensitivityTable:
        """Return what was measured.

        Raises:
            RuntimeError: before calibration has ended.
        """
        if self._table is None:
            raise RuntimeError("nothing has been measured yet: pass this modifier to oneshot")
        return self._table

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check options, targets and data.

        Raises:
            ValueError: if an option is unknown, a target matches nothing or there are no data.
        """
        preflight.count_tokens(_calibration_data(state), state.model)
        preflight.check_finite_weights(state.model)
        if self.row_feedback:
            preflight.check_backward_pass(state.model)
        self._layers = linear_moe_layers(state.model)
        self._choices = self._find_choices(state.model)
        self._choices.check_fit()
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Measure gradients, then register the hooks that accumulate second moments.

        Raises:
            ValueError: if a domain has too few sequences to halve, or no name.
        """
        undo_with_oneshot(self._undo)
        self._undo.callback(self.remove_hooks)  # a failure sends no event that would remove them
        domains = Domains.of(_calibration_data(state), self.config.domain_names)
        # from here on, so that it holds for the backward passes as well
        run_routed_tokens_only(state.model, self._undo)
        report_progress(layer_progress("measure", (), self._choices.names.values()))
        # before the pass that is observed: the backward passes run the model too
        row_weights = self._row_weights(state) if self.config.gradient else None
        outputs = self._output_moments(state) if self.row_feedback else None
        # the host caches its batches between this event and the first layer
        watch = PaddingWatch(state)
        listen_to_batches(watch, self._undo)
        self._measurement = self._new_measurement(watch, domains, row_weights, outputs)
        self._measurement.begin(state.model, self._layers, self.register_hook)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        """Round and judge the linears that were called since the last layer."""
        self._measurement.finish_layer()

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Put the table together and remove hooks."""
        self._table = self._measurement.table()
        self._undo.close()

    def _new_measurement(
        self,
        watch: PaddingWatch,
        domains: Domains,
        row_weights: Mapping[nn.Linear, torch.Tensor] | None,
        outputs: OutputMoments | None,
    ) -> Measurement:
        halves = Halves(
            watch,
            domains,
            self._choices.names,
            affinity_power=self.affinity_power,
            weight_gate_proj=self.weight_gate_proj,
            seed=self.seed,
        )
        return Measurement(
            self._choices,
            halves,
            self._trial_rounding(outputs),
            Interactions(self._layers if self.config.interactions else ()),
            row_weights,
            undercovered_tokens=self.config.undercovered_tokens,
            kept=self._kept.layers if self._kept is not None else None,
        )

    def _find_choices(self, model: PreTrainedModel) -> Choices:
        return Choices.of(
            model,
            self._layers,
            options=self.options,
            targets=self.targets,
            ignore=self.ignore,
            weight_observer=self.weight_observer,
        )

    def _trial_rounding(self, outputs: OutputMoments | None) -> TrialRounding:
        return TrialRounding(
            min_effective_tokens=self.min_effective_tokens,
            shrinkage=self.shrinkage,
            solver=self.solver_options(),
            outputs=outputs,
            codebook_steps=self.refine_steps,
        )

    def _output_moments(self, state: State) -> OutputMoments:
        linears = {name: linear for linear, name in self._choices.names.items()}
        outputs = OutputMoments(state.model, linears)
        outputs.record(_calibration_data(state), self.seed)
        return outputs

    def _row_weights(self, state: State) -> dict[nn.Linear, torch.Tensor]:
        def measure() -> dict[nn.Linear, torch.Tensor]:
            logger.info("sensitivity: one backward pass per calibration batch")
            return measure_row_weights(
                state.model,
                _calibration_data(state),
                self._choices.names,
                self._layers,
                config=self.config,
                seed=self.seed,
            )

        if self._kept is None:
            return measure()
        return self._kept.row_weights(self._choices.names, measure)


def measure_sensitivity(
    modifier: SensitivityModifier, state: State, kept: KeptMeasurements | None
) -> SensitivityTable:
    """Run a modifier through the calibration data, inside a oneshot that does something else.

    Args:
        modifier: not initialized yet.
        state: the host's, with model and data.
        kept: where what is measured is kept, and found if an earlier process has measured it.
    """
    modifier._kept = kept
    # as the host would, had it stood in the recipe; the host refuses events to one that it does
    # not take for initialized
    modifier.initialize(state)
    # its weights stay as they are, so that there is no error to propagate
    run_pass(modifier, state, _calibration_data(state), propagate_error=False)
    modifier.finalize(state)
    return modifier.table


def _calibration_data(state: State) -> DataLoader[Mapping[str, torch.Tensor]]:
    """Return the calibration data.

    Raises:
        ValueError: if there are none.
    """
    data: DataLoader[Mapping[str, torch.Tensor]] | None = state.data.calib
    if data is None:
        raise ValueError("sensitivities are measured on data: pass dataset=... to oneshot")
    return data
