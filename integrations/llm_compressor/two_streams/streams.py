"""Carry the 16-bit stream beside the quantized one, from decoder layer to decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from llmcompressor.args.dataset_arguments import DatasetArguments
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from torch import nn

from moeq_plugin.integrations.llm_compressor import host
from moeq_plugin.integrations.llm_compressor.calibration import ranks
from moeq_plugin.integrations.llm_compressor.calibration.observations import (
    Calibration,
    RegisterHook,
)
from moeq_plugin.integrations.llm_compressor.two_streams.counterpart import Counterpart
from moeq_plugin.integrations.llm_compressor.two_streams.layer_calls import LayerCalls
from moeq_plugin.integrations.llm_compressor.two_streams.originals import Originals
from moeq_plugin.integrations.llm_compressor.two_streams.stages import Stage, stages_of
from moeq_plugin.integrations.llm_compressor.two_streams.structure import is_near, why_unlike
from moeq_plugin.models.decoders import DecoderLayer
from moeq_plugin.models.moe import MoELayer

NewCalibration = Callable[[Counterpart | None], Calibration]
_STATES = "states"


class TwoStreams:
    """Runs each decoder layer once more per stage, on what both models send into it.

    The host runs a layer on what the quantized layers before it put out, and once more when it has
    been rounded. In between :meth:`stages` observes its linears stage by stage, each after the one
    before has been rounded; :meth:`leave` comes after the last one.

    Args:
        model: the whole.
        layers: its decoder layers in order of execution.
        moe_layers: its MoE layers.
        new_calibration: makes what observes a stage, with or without the 16-bit stream.
        modifier: the host's, whose hooks the host switches off where it does not calibrate.
        uncorrected: gets the layers that are rounded without the 16-bit stream, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[DecoderLayer],
        moe_layers: list[MoELayer],
        new_calibration: NewCalibration,
        modifier: Modifier,
        uncorrected: dict[str, str],
    ) -> None:
        self._layers = {layer.whole.module: layer for layer in layers}
        self._model, self._moe_layers = model, moe_layers
        self._new_calibration, self._modifier = new_calibration, modifier
        self._uncorrected = uncorrected
        running = host.running_oneshot()
        arguments = running.dataset_args if running is not None else DatasetArguments()
        self._offload_device = torch.device(arguments.sequential_offload_device)
        self._calls: dict[nn.Module, LayerCalls] = {}
        # what the 16-bit layers so far have put out, batch by batch
        self._hidden: IntermediatesCache | None = None
        # the first batch, as the quantized layers so far have put it out
        self._handed_on: torch.Tensor | None = None

    def attach(self) -> None:
        """Register the hooks that note what layers are called with."""
        register: RegisterHook = self._modifier.register_hook
        for layer in self._layers:
            self._calls[layer] = LayerCalls(layer, self._offload_device)
            register(layer, self._calls[layer].note, "forward_pre", with_kwargs=True)

    def covered(self) -> set[nn.Module]:
        """Return the modules that stages observe, as far as they are targeted."""
        parts = (part for of in self._layers.values() for part in (of.attention, of.mlp))
        return {module for part in parts for module in part.module.modules()}

    def stages(
        self, state: State, pending: Collection[nn.Module], modules: Collection[nn.Module]
    ) -> Iterator[Calibration]:
        """Yield what each stage of a layer was observed by; round its linears before the next.

        Args:
            state: the host's.
            pending: what is still to be rounded.
            modules: those that the host has just run, with one decoder layer or none among them.
        """
        for module in modules:
            if module not in self._layers:
                continue
            layer, calls = self._layers[module], self._calls[module]
            self._enter(layer, calls)
            stages = stages_of(layer, pending)
            originals = Originals(linear for stage in stages for linear in stage.linears)
            totals: dict[int, torch.Tensor] = {}
            for stage in stages:
                counterpart = Counterpart(stage, layer.mlp.module, originals, totals)
                if stage.source is not None and stages[-1].linears or stage.linears:
                    yield self._observe(calls, stage, counterpart, state)
                elif stage is stages[-1]:
                    self._carry_on(calls, counterpart)

    def leave(self, modules: Collection[nn.Module]) -> None:
        """Forget a layer that has been rounded.

        Args:
            modules: as of :meth:`stages`.
        """
        for module in modules:
            if calls := self._calls.get(module):
                with HooksMixin.disable_hooks(), torch.no_grad():
                    self._handed_on = calls.run(0)
                calls.forget()

    def _enter(self, layer: DecoderLayer, calls: LayerCalls) -> None:
        """Begin with the 16-bit stream, or find out that it is none."""
        if self._uncorrected:
            reason = f"follows {next(iter(self._uncorrected))}"
        else:
            with HooksMixin.disable_hooks():
                found = self._why_broken(calls) or why_unlike(layer, calls)
            # of any rank, or one would wait for another that does something else
            reason = next((other for other in ranks.gather(found) if other), "")
        if reason:
            if not self._uncorrected:
                logger.warning(f"no corrected target from {layer.whole.name} on: {reason}")
            self._uncorrected[layer.whole.name] = reason
            self._hidden = None
        elif self._hidden is None:
            self._hidden = IntermediatesCache(None, self._offload_device)
            for index in range(len(calls)):
                self._hidden.append({_STATES: calls.hidden(index)})

    def _why_broken(self, calls: LayerCalls) -> str | None:
        """Return why a layer does not go on where the one before has ended, ``None`` if it does."""
        if self._hidden is None or self._handed_on is None:
            return None
        # the second where the host was told to propagate no error
        before = (self._handed_on, self._hidden.fetch(0)[_STATES])
        if any(is_near(calls.hidden(0), states) for states in before):
            return None
        return "it does not receive what the decoder layer before it puts out"

    def _observe(
        self,
        calls: LayerCalls,
        stage: Stage,
        counterpart: Counterpart,
        state: State,
    ) -> Calibration:
        calibration = self._new_calibration(None if self._uncorrected else counterpart)
        handles: set[Any] = set()

        def register_hook(*arguments: Any, **others: Any) -> None:
            handles.add(self._modifier.register_hook(*arguments, **others))

        within = set(calls.layer.modules())
        moe_layers = [layer for layer in self._moe_layers if layer.block in within]
        calibration.attach(self._model, moe_layers, list(stage.linears), register_hook)
        with ExitStack() as undo, torch.no_grad():
            host.run_routed_tokens_only(calls.layer, undo)
            undo.callback(self._modifier.remove_hooks, handles)
            for index in range(len(calls)):
                state.current_batch_idx = index
                self._run_theirs(calls, index, stage.source or stage.until, counterpart)
                with HooksMixin.disable_hooks(keep=handles), counterpart.noting_ours():
                    calls.run(index, until=stage.until)
        return calibration

    def _carry_on(self, calls: LayerCalls, counterpart: Counterpart) -> None:
        """Run the 16-bit layer where there is nothing to observe in its last stage."""
        with torch.no_grad():
            for index in range(len(calls)):
                self._run_theirs(calls, index, None, counterpart)

    def _run_theirs(
        self, calls: LayerCalls, index: int, until: nn.Module | None, counterpart: Counterpart
    ) -> None:
        if self._hidden is None:
            return
        with HooksMixin.disable_hooks(), counterpart.noting_theirs(index):
            output = calls.run(index, self._hidden.fetch(index)[_STATES], until)
        if output is not None:  # of the last stage: where the layer after it begins
            self._hidden.update(index, {_STATES: output})
