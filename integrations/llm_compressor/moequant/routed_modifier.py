"""GPTQ on routed tokens: how a modifier that has runs answers llm-compressor's events."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from pydantic import PrivateAttr
from torch import nn

from moeq_plugin.integrations.llm_compressor import host, places, preflight, recipe
from moeq_plugin.integrations.llm_compressor.calibration import ranks
from moeq_plugin.integrations.llm_compressor.moequant.request import Request
from moeq_plugin.integrations.llm_compressor.moequant.routed_recipe import RoutedRecipe
from moeq_plugin.integrations.llm_compressor.self_sampling.calibrate import write_own_text
from moeq_plugin.integrations.llm_compressor.unfinished import mark_finished
from moeq_plugin.models.linear_experts import linear_moe_layers
from moeq_plugin.models.moe import MoELayer
from moeq_plugin.records.environment import run_facts, versions
from moeq_plugin.records.progress import quantize_progress, report_progress
from moeq_plugin.records.run import RunRecord


class Phases(Protocol):
    """What happens to a model between the start and the end of a calibration pass."""

    def begin(self, state: State) -> None:
        """Register hooks."""

    def finish_layer(self, state: State, modules: list[nn.Module]) -> None:
        """Quantize the modules of the layer that has just been calibrated."""

    def end(self, state: State) -> None:
        """Quantize what no batch has called and remove hooks."""

    def pending(self) -> list[str]:
        """Return the names of what is still to be quantized."""

    def close(self, state: State) -> None:
        """Say what was done."""


@dataclass(frozen=True)
class Start:
    """What is known when a run starts.

    Attributes:
        layers: the model's MoE layers.
        has_data: whether oneshot was given data; the model writes its own text otherwise.
        tokens: what those data hold; of no batches without data.
        began: ``time.monotonic()``.
    """

    layers: list[MoELayer]
    has_data: bool
    tokens: preflight.TokenCount
    began: float


class RoutedModifier(RoutedRecipe):
    """Hands the events of llm-compressor's life cycle to the phases of its runs.

    A subclass checks the request in ``on_initialize`` and sets its record and phases there, or in
    :meth:`_begin_pass` where the schemes depend on the data.
    """

    _start: Start = PrivateAttr()
    _record: RunRecord = PrivateAttr()
    _phases: tuple[Phases, ...] = PrivateAttr()
    _undo: ExitStack = PrivateAttr(default_factory=ExitStack)

    @property
    def record(self) -> RunRecord:
        """Return what was done so far; there is none before schemes are attached."""
        return self._record

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Register hooks; without data, let the model write some and run a pass over it."""
        if self._start.has_data:
            ranks.check_data_differ(host.calibration_batches(state))
            self._begin_pass(state)
            return
        text = write_own_text(state.model, self.ebss, self._text_path())
        # what looks for data from here on, such as a measuring pass, finds the text
        state.data.calib = text.batches
        # not of `self`: the events of this pass would look like those of the one that is running,
        # which has no data and sends the same three events once more when this is over
        host.run_pass(_OwnPass.over(self), state, text.batches)
        self._record.sampling = text.report

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        """Quantize the layer that has just been calibrated."""
        if self._start.has_data:  # else a pass of our own has done it
            self._finish_layer(state, modules)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Round to nearest what no batch has called, then remove hooks and observers."""
        if self._start.has_data:
            self._end_pass(state)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Say in one line whether every linear was quantized as asked."""
        self._record.run |= run_facts(self._start.began)
        for phases in self._phases:
            phases.close(state)
        self._undo.close()
        mark_finished(state.model.modules())
        return True

    def _check_start(self, state: State) -> None:
        """Refuse what can be known to be wrong of the recipe's place, the data and the output.

        Raises:
            ValueError: saying what to do instead; nothing has been changed then.
        """
        layers = linear_moe_layers(state.model)
        recipe.check_stack(self, state.model, layers)
        calib = state.data.calib
        preflight.check_data(calib, type(self).__name__, has_experts=bool(layers))
        preflight.check_merged(state.model)
        preflight.check_alone(self, state.model, layers)
        preflight.check_sequential_targets(state.model, layers)
        if self.corrected_target:
            preflight.check_layer_by_layer(state.model)
        preflight.check_saving(state.model, layers)
        places.stage_running_output()
        tokens = preflight.TokenCount(0)
        if calib is not None:
            tokens = preflight.count_tokens(calib, state.model)
            tokens.warn()
        preflight.check_finite_weights(state.model)
        self._start = Start(layers, calib is not None, tokens, time.monotonic())

    def _new_record(self, request: Request, state: State) -> RunRecord:
        """Return the record of a run that has done nothing yet."""
        calibration = "text that the model wrote itself"
        if self._start.has_data:
            calibration = self._start.tokens.in_words()
        return RunRecord(
            modifier=request.modifier,
            settings=dict(request.settings),
            given=self.given(),
            versions=versions(),
            kept=dict(request.kept),
            model=getattr(state.model, "name_or_path", ""),
            calibration=calibration,
        )

    def _declare_data(self) -> None:
        """Tell the host whether there are data, once nothing speaks against the run any more."""
        # registered before there is anything to undo, so that a failure in between undoes it too
        host.undo_with_oneshot(self._undo)
        host.declare_data(self, self._start.has_data, self._undo)

    def _text_path(self) -> Path | None:
        """Return where text that the model writes is kept, ``None`` for nowhere."""
        return None

    def _begin_pass(self, state: State) -> None:
        for phases in self._phases:
            phases.begin(state)
        self._report_progress(0)

    def _finish_layer(self, state: State, modules: list[nn.Module]) -> None:
        num_before = len(self._record.linears)
        for phases in self._phases:
            phases.finish_layer(state, modules)
        num_finished = len(self._record.linears) - num_before
        if num_finished:
            self._keep_layer()
            self._report_progress(num_finished)

    def _keep_layer(self) -> None:
        """Keep what all phases have made of a layer; by default nothing is kept."""

    def _report_progress(self, num_finished_now: int) -> None:
        pending = [name for phases in self._phases for name in phases.pending()]
        report_progress(quantize_progress(self._record, num_finished_now, pending))

    def _end_pass(self, state: State) -> None:
        for phases in self._phases:
            phases.end(state)


class _OwnPass(Modifier):
    """Receives the events of a pass over text that the model wrote."""

    _asked: RoutedModifier = PrivateAttr()

    @classmethod
    def over(cls, asked: RoutedModifier) -> _OwnPass:
        """Return what hands the events of a pass to ``asked``."""
        own = cls(initialized_=True)  # or the host would refuse to send it events
        own._asked = asked
        return own

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Do nothing: the modifier that asked has been initialized."""
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Register hooks."""
        self._asked._begin_pass(state)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        """Quantize a layer."""
        self._asked._finish_layer(state, modules)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """End the pass."""
        self._asked._end_pass(state)
