"""Encode the linears that get a codebook, layer by layer, by the second moments of their inputs."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.offload import disable_offloading, update_offload_parameter
from llmcompressor.core import State
from llmcompressor.modifiers.utils.hooks import HooksMixin
from torch import nn

from moeq_plugin.core.codebook import CodebookFormat, CodebookWeight
from moeq_plugin.core.codebook_solver import solve_codebook
from moeq_plugin.integrations.llm_compressor import host
from moeq_plugin.integrations.llm_compressor.calibration import rank_moments
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.integrations.llm_compressor.moequant.request import Request
from moeq_plugin.integrations.llm_compressor.schemes import weight_of
from moeq_plugin.integrations.llm_compressor.unfinished import mark_changed
from moeq_plugin.models.moe import find_moe_layers
from moeq_plugin.records.run import Basis, LinearRecord, RunRecord


def take_encoded(module: nn.Module, encoded: CodebookWeight) -> str:
    """Let a module run on its encoded weight from now on; return the format in words."""
    mark_changed(module)
    update_offload_parameter(module, "weight", encoded.decode().view_as(weight_of(module)))
    form = encoded.form
    return (
        f"codebook {form.index_bits} bit per {form.vector_dim}, "
        f"{form.group_rows} x {form.group_columns}"
    )


class CodebookRun:
    """Puts linears into codebooks; phases as those of a scalar run.

    Args:
        request: what was asked for.
        state: the host's.
        record: filled in linear by linear.
        encoded: filled in likewise: what stands for each weight, by name.
        coded: the linears by name.
        form: of their codebooks.
        refine_steps: see :func:`moeq_plugin.core.codebook_solver.solve_codebook`.
    """

    def __init__(
        self,
        request: Request,
        state: State,
        record: RunRecord,
        encoded: dict[str, CodebookWeight],
        coded: dict[str, nn.Linear],
        form: CodebookFormat,
        refine_steps: int,
    ) -> None:
        self._request, self._record, self._encoded = request, record, encoded
        self._form, self._refine_steps = form, refine_steps
        self._names: dict[nn.Module, str] = {linear: name for name, linear in coded.items()}
        self._pending = dict(coded)  # shrinks as weights are encoded
        self._hooks = HooksMixin()  # the host's switch that silences hooks covers these too
        self._undo = ExitStack()
        host.undo_with_oneshot(self._undo)
        self._padding = PaddingWatch(state)
        self._calibration = request.calibration(self._padding)

    def begin(self, state: State) -> None:
        """Register the hooks that accumulate second moments."""
        host.listen_to_batches(self._padding, self._undo)
        self._undo.callback(self._hooks.remove_hooks)
        linears, layers = list(self._pending.values()), find_moe_layers(state.model)
        self._calibration.attach(state.model, layers, linears, self._hooks.register_hook)

    def finish_layer(self, state: State, modules: list[nn.Module]) -> None:
        """Encode every linear observed since the last layer."""
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

    def close(self, state: State) -> None:
        """Do nothing: the record says what was done."""

    def _encode(
        self,
        linear: nn.Linear,
        hessian: torch.Tensor,
        weight_sum: float,
        basis: Basis,
        effective_tokens: float,
    ) -> None:
        solution = solve_codebook(
            linear.weight,
            hessian,
            self._form,
            dampening_frac=self._request.host_fields["dampening_frac"] or 0.0,
            refine_steps=self._refine_steps,
        )
        is_nearest = basis is Basis.NONE or solution.is_nearest
        loss = None if is_nearest else solution.loss.sum().item() / weight_sum
        basis = Basis.NONE if is_nearest else basis
        name = self._names[linear]
        del self._pending[name]
        self._encoded[name] = solution.weight
        # at once: the host is about to run the layer again for the inputs of the next one
        scheme = take_encoded(linear, solution.weight)
        self._record.linears.append(LinearRecord(name, scheme, basis, effective_tokens, loss))
