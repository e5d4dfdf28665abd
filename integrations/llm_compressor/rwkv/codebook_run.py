"""Encode the linears that get a codebook, layer by layer, by the second moments of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.offload import disable_offloading
from llmcompressor.core import State
from llmcompressor.modifiers.utils.hooks import HooksMixin
from torch import nn

from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.core.codebook_solver import solve_codebook
from moeq_plugin.integrations.llm_compressor import host
from moeq_plugin.integrations.llm_compressor.calibration import rank_moments
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.integrations.llm_compressor.moequant.request import Request
from moeq_plugin.integrations.llm_compressor.rwkv.encoded_weights import EncodedWeights
from moeq_plugin.models.moe import find_moe_layers
from moeq_plugin.records.run import Basis


class CodebookRun:
    """Puts linears into codebooks; phases as those of a scalar run.

    Args:
        request: what was asked for.
        state: the host's.
        encoded: filled in linear by linear.
        forms: the format of each linear by name.
        refine_steps: see :func:`moeq_plugin.core.codebook_solver.solve_codebook`.
        is_last: whether no modifier comes behind, which would look for the linears. Decoded weights
            then leave memory with their layer, and not only when the run is over.
    """

    def __init__(
        self,
        request: Request,
        state: State,
        encoded: EncodedWeights,
        forms: Mapping[str, CodebookFormat],
        refine_steps: int,
        *,
        is_last: bool,
    ) -> None:
        self._request, self._encoded, self._is_last = request, encoded, is_last
        self._passed: set[str] = set()  # of the last layer, which the host has run twice by now
        self._forms, self._refine_steps = forms, refine_steps
        modules = dict(state.model.named_modules())
        self._pending: dict[str, nn.Linear] = {name: modules[name] for name in forms}  # shrinks
        self._names: dict[nn.Module, str] = {of: name for name, of in self._pending.items()}
        self._hooks = HooksMixin()  # the host's switch that silences hooks covers these too
        self._undo = ExitStack()
        host.undo_with_oneshot(self._undo)
        self._padding = PaddingWatch(state)
        self._calibration = request.calibration(self._padding)

    def begin(self, state: State) -> None:
        """Take over what is finished, then register the hooks that accumulate second moments."""
        for name in self._encoded.restore(self._pending, self._forms):
            del self._pending[name]  # what is finished gets no hooks
        host.listen_to_batches(self._padding, self._undo)
        self._undo.callback(self._hooks.remove_hooks)
        linears, layers = list(self._pending.values()), find_moe_layers(state.model)
        self._calibration.attach(state.model, layers, linears, self._hooks.register_hook)

    def finish_layer(self, state: State, modules: list[nn.Module]) -> None:
        """Encode every linear observed since the last layer, and pack those of that layer."""
        self._encoded.replace(state.model, self._passed)
        if self._is_last:
            self._passed = {self._names[module] for module in modules if module in self._names}
        if is_distributed():
            rank_moments.sum_over_ranks(self._calibration, self._names)
        self._calibration.check_finite(self._names)
        with torch.no_grad(), disable_offloading():
            # every rank encodes all weights, from the same sums and so to the same codes
            for observation in self._calibration.observations.values():
                hessian, weight_sum, basis = self._request.guard(observation, self._calibration)
                tokens = observation.moments.effective_tokens
                for linear in observation.linears:
                    self._encode(linear, hessian, weight_sum, basis, tokens)
        self._calibration.clear_layer()

    def end(self, state: State) -> None:
        """Encode what no batch has called, then remove hooks."""
        with torch.no_grad(), disable_offloading():
            for linear in list(self._pending.values()):
                # every column counts alike and none affects another: rounding to nearest
                nothing = torch.eye(linear.in_features, device=linear.weight.device)
                self._encode(linear, nothing, 1.0, Basis.NONE, 0.0)
        self._undo.close()

    def pending(self) -> list[str]:
        """Return the names of what is still to be encoded."""
        return list(self._pending)

    def close(self, state: State) -> None:
        """Replace encoded modules by packed ones."""
        self._encoded.replace(state.model)

    def _encode(
        self,
        linear: nn.Linear,
        hessian: torch.Tensor,
        weight_sum: float,
        basis: Basis,
        effective_tokens: float,
    ) -> None:
        name = self._names[linear]
        solution = solve_codebook(
            linear.weight,
            hessian,
            self._forms[name],
            dampening_frac=self._request.solver.dampening_frac,
            refine_steps=self._refine_steps,
        )
        is_nearest = basis is Basis.NONE or solution.is_nearest
        loss = None if is_nearest else solution.loss.sum().item() / weight_sum
        basis = Basis.NONE if is_nearest else basis
        del self._pending[name]
        # at once: the host is about to run the layer again for the inputs of the next one
        self._encoded.put(name, linear, solution.weight, basis, effective_tokens, loss)
