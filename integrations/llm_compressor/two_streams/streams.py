"""Carry the 16-bit stream beside the quantized one, from decoder layer to decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack

import torch
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import nn

from moeq_plugin.integrations.llm_compressor import host
from moeq_plugin.integrations.llm_compressor.two_streams.counterpart import Counterpart
from moeq_plugin.integrations.llm_compressor.two_streams.layer_calls import LayerCalls
from moeq_plugin.integrations.llm_compressor.two_streams.originals import Originals
from moeq_plugin.integrations.llm_compressor.two_streams.paired import PairedCalibration
from moeq_plugin.integrations.llm_compressor.two_streams.stages import Stage, stages_of
from moeq_plugin.models.decoders import DecoderLayer
from moeq_plugin.models.moe import MoELayer

NewCalibration = Callable[[Counterpart], PairedCalibration]


class TwoStreams:
    """Runs each decoder layer once more per stage, on what both models send into it.

    The host runs a layer on what the quantized layers before it put out, and once more when it has
    been rounded. In between :meth:`stages` observes its linears stage by stage, each after the one
    before has been rounded.

    Args:
        layers: the decoder layers in order of execution.
        moe_layers: the model's MoE layers.
        targeted: what is to be rounded.
        new_calibration: makes what observes a stage.
        modifier: the host's, whose hooks the host switches off where it does not calibrate.
    """

    def __init__(
        self,
        layers: list[DecoderLayer],
        moe_layers: list[MoELayer],
        targeted: Collection[nn.Module],
        new_calibration: NewCalibration,
        modifier: Modifier,
    ) -> None:
        self._layers, self._moe_layers = layers, moe_layers
        self._targeted = set(targeted)
        self._new_calibration, self._modifier = new_calibration, modifier
        self._offload_device = host.offload_device()
        self._calls: dict[nn.Module, LayerCalls] = {}
        # what the 16-bit layers before the next one put out, batch by batch
        self._hidden: IntermediatesCache | None = None

    def attach(self) -> None:
        """Register the hooks that note what layers are called with."""
        for layer in self._layers:
            calls = LayerCalls(layer.whole.module, self._offload_device)
            self._calls[layer.whole.module] = calls
            self._modifier.register_hook(
                layer.whole.module, calls.note, "forward_pre", with_kwargs=True
            )

    def covers(self, module: nn.Module) -> bool:
        """Tell whether a module is observed by a stage."""
        return any(
            module in set(part.modules())
            for layer in self._layers
            for part in (layer.attention.module, layer.mlp.module)
        )

    def stages(
        self, state: State, model: nn.Module, modules: Collection[nn.Module]
    ) -> Iterator[PairedCalibration]:
        """Yield what each stage of a layer was observed by; round its linears before the next.

        Args:
            state: the host's.
            model: the whole.
            modules: those that the host has just run, with one decoder layer or none among them.
        """
        present = set(modules)
        for layer in self._layers:
            if layer.whole.module in present:
                yield from self._stages_of(layer, state, model)

    def _stages_of(
        self, layer: DecoderLayer, state: State, model: nn.Module
    ) -> Iterator[PairedCalibration]:
        calls = self._calls.pop(layer.whole.module)
        if self._hidden is None:
            self._hidden = IntermediatesCache(None, self._offload_device)
            for index in range(len(calls)):
                self._hidden.append({"states": calls.hidden(index)})
        stages = stages_of(layer, self._targeted)
        originals = Originals(linear for stage in stages for linear in stage.linears)
        totals: dict[int, torch.Tensor] = {}
        for stage in stages[:-1]:
            if stage.linears or stage.source is not None:
                counterpart = Counterpart(stage, layer.mlp.module, originals, totals)
                yield self._observe(calls, stage, counterpart, state, model)
        # the last one runs both to their end, and so carries the 16-bit stream on
        counterpart = Counterpart(stages[-1], layer.mlp.module, originals, totals)
        yield self._observe(calls, stages[-1], counterpart, state, model)

    def _observe(
        self,
        calls: LayerCalls,
        stage: Stage,
        counterpart: Counterpart,
        state: State,
        model: nn.Module,
    ) -> PairedCalibration:
        calibration = self._new_calibration(counterpart)
        handles: set[object] = set()

        def register_hook(*arguments: object, **others: object) -> None:
            handles.add(self._modifier.register_hook(*arguments, **others))

        within = {m for m in calls.layer.modules()}
        moe_layers = [layer for layer in self._moe_layers if layer.block in within]
        calibration.attach(model, moe_layers, list(stage.linears), register_hook)
        with ExitStack() as undo, torch.no_grad():
            host.run_routed_tokens_only(calls.layer, undo)
            undo.callback(self._modifier.remove_hooks, handles)
            for index in range(len(calls)):
                state.current_batch_idx = index
                theirs = self._hidden.fetch(index)["states"]
                with HooksMixin.disable_hooks(), counterpart.noting_theirs(index):
                    until = stage.until if stage.source is None else stage.source
                    output = calls.run(index, theirs, until)
                if output is not None:
                    self._hidden.update(index, {"states": output})
                with HooksMixin.disable_hooks(keep=handles), counterpart.noting_ours():
                    calls.run(index, until=stage.until)
        return calibration
