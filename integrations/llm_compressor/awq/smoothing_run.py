"""One run of MoEQuantAWQModifier: all of its state, in phases that the host's events call."""

from __future__ import annotations

import time
from contextlib import ExitStack

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.offload import disable_offloading
from llmcompressor.core import Event, State
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import ResolvedMapping
from torch import nn

from moeq_plugin.core.grid import Grid
from moeq_plugin.integrations.llm_compressor.awq.batches import BatchMasks
from moeq_plugin.integrations.llm_compressor.awq.calibration import SmoothingCalibration
from moeq_plugin.integrations.llm_compressor.awq.clipping import clip_linear, clippable
from moeq_plugin.integrations.llm_compressor.awq.layer_inputs import LayerInputs
from moeq_plugin.integrations.llm_compressor.awq.mappings import find_mappings, judged_alone
from moeq_plugin.integrations.llm_compressor.awq.search import Choice, Search, Structure
from moeq_plugin.integrations.llm_compressor.awq.smoothing_record import (
    Request,
    new_record,
    note_chosen,
    note_left_out,
    note_uncalled,
    report,
)
from moeq_plugin.integrations.llm_compressor.calibration import ranks
from moeq_plugin.integrations.llm_compressor.calibration.observations import RegisterHook
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.integrations.llm_compressor.checkpoint.saving import prepare_saving
from moeq_plugin.integrations.llm_compressor.host import (
    listen_to_batches,
    run_routed_tokens_only,
    undo_with_oneshot,
)
from moeq_plugin.integrations.llm_compressor.schemes import unquantized
from moeq_plugin.integrations.llm_compressor.unfinished import mark_changed, mark_finished
from moeq_plugin.models.moe import MoELayer
from moeq_plugin.records.environment import run_facts
from moeq_plugin.records.run import Basis


class Run:
    """From a request that can succeed to the line that says what became of it.

    Making one finds the mappings and tries them; the model is as it was afterwards.

    Args:
        recipe: whose run it is, for the fields of the host's AWQ; read, never written.
        request: its other fields.
        state: the host's, with model and data.
        layers: the model's MoE layers.

    Attributes:
        record: what was done so far.

    Raises:
        UnsupportedModelError: if a decoder layer has parts whose place is not known.
    """

    def __init__(
        self, recipe: AWQModifier, request: Request, state: State, layers: list[MoELayer]
    ) -> None:
        self._began = time.monotonic()
        self._request = request
        self._structure = _structure(state.model, layers, is_mapped=recipe.mappings is not None)
        self._padding = PaddingWatch(state)
        self._masks = BatchMasks(self._padding)
        self._search = Search(recipe, self._structure, self._masks)
        self._search.initialize(state)
        self._calibration = SmoothingCalibration(
            affinity_power=request.affinity_power, seed=request.seed, padding=self._padding
        )
        self._clippable: dict[nn.Linear, Grid] = {}  # filled when schemes are attached
        self._undo = ExitStack()
        self.record = new_record(recipe, request, state)

    def begin(self, state: State, event: Event) -> None:
        """Observe what is quantized by schemes that later modifiers have attached by now."""
        model, search = state.model, self._search
        register_hook: RegisterHook = search.register_hook  # typed by the host for one argument
        undo_with_oneshot(self._undo)
        self._undo.callback(search.remove_hooks)
        listen_to_batches(self._padding, self._undo)
        # a token that is not routed has weight zero: do not compute what will not count
        run_routed_tokens_only(model, self._undo)
        search.on_calibration_start(state, event)
        self.record.left_out.update(search.left_out)
        prepare_saving(model, self._structure.layers, self.record, lambda _directory: None)
        linears = [x for x in map(judged_alone, search.resolved) if x is not None]
        if self._request.clip:
            self._clippable.update(clippable(model))
            linears += [linear for linear in self._clippable if linear not in linears]
        self._calibration.attach(model, self._structure.layers, linears, register_hook)
        self._calibration.watch(search.resolved, register_hook)
        register_hook(model, self._masks.note, "forward_pre", with_kwargs=True)

    def finish_layer(self, state: State, event: Event) -> None:
        """Smooth the layer that has just been calibrated, then clip it.

        Raises:
            ValueError: if an input holds NaN or infinity.
        """
        calibration, names = self._calibration, self._structure.names
        if is_distributed():
            calibration.sum_over_ranks(self._search.resolved, names)
        calibration.check_finite(names)
        with torch.no_grad(), disable_offloading(), unquantized(state.model):
            inputs = calibration.layer_inputs(self._request.min_effective_tokens)
            mappings = [m for m in self._search.resolved if m.smooth_name in inputs.magnitudes]
            judged = [mapping for mapping in mappings if inputs.has_tokens(mapping)]
            changed = self._changed_modules(mappings, inputs)
            for module in changed:
                mark_changed(module)
            with ranks.own_copies(changed):
                choices = self._search.smooth(state, event, judged, inputs)
                self._clip(choices, inputs)
        note_chosen(self.record, choices, inputs, calibration.is_weighted)
        note_left_out(self.record, mappings, inputs)
        calibration.clear_layer()

    def end(self, state: State, event: Event) -> None:
        """Note what no batch has called, then remove hooks."""
        note_uncalled(self.record, self._search.resolved)
        self._undo.close()
        self._search.on_calibration_end(state, event)

    def report(self, state: State) -> None:
        """Name the experts that borrowed, then say in one line what was smoothed."""
        self.record.run = run_facts(self._began)
        report(self.record)
        self._search.finalize(state)
        mark_finished(state.model.modules())

    def _changed_modules(
        self, mappings: list[ResolvedMapping], inputs: LayerInputs
    ) -> list[nn.Module]:
        """Return what the layer's smoothing and clipping change, in the order of their names."""
        changed: set[nn.Module] = {*(inputs.moments.keys() & self._clippable.keys())}
        for mapping in mappings:
            changed |= {mapping.smooth_layer, *mapping.balance_layers}
        return sorted(changed, key=self._structure.names.__getitem__)

    def _clip(self, choices: list[Choice], inputs: LayerInputs) -> None:
        """Clamp outliers of the layer's weights, judged on the inputs as they are scaled by now."""
        scales = {layer: of.scales for of in choices for layer in of.mapping.balance_layers}
        for linear, moments in inputs.moments.items():
            grid = self._clippable.get(linear)
            if grid is not None and moments.basis is not Basis.NONE:
                share = clip_linear(linear, grid, moments.hessian, scales.get(linear))
                if share is not None:
                    self.record.clipped[self._structure.names[linear]] = share


def _structure(model: nn.Module, layers: list[MoELayer], *, is_mapped: bool) -> Structure:
    names = {module: name for name, module in model.named_modules()}
    if is_mapped:
        return Structure(layers, names, found=None)
    with ranks.in_turn(), disable_offloading():
        return Structure(layers, names, find_mappings(model, layers))
