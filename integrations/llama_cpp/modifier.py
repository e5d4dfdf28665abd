"""Compute llama.cpp's importance matrix in the host's layer-by-layer pass."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

from compressed_tensors.distributed import is_distributed
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from pydantic import Field, PrivateAttr
from torch import nn

from moeq_plugin.integrations.llama_cpp.column_importance import ColumnImportance
from moeq_plugin.integrations.llama_cpp.conversion import conversion_of
from moeq_plugin.integrations.llama_cpp.matrix_file import ImportanceMatrix
from moeq_plugin.integrations.llama_cpp.tensor_names import tensor_names
from moeq_plugin.integrations.llm_compressor import preflight
from moeq_plugin.integrations.llm_compressor.allocation.target_linears import target_linears
from moeq_plugin.integrations.llm_compressor.calibration import rank_moments
from moeq_plugin.integrations.llm_compressor.calibration.observations import Calibration
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.integrations.llm_compressor.calibration.ranks import check_data_differ, gather
from moeq_plugin.integrations.llm_compressor.frozen_fields import FrozenFields
from moeq_plugin.integrations.llm_compressor.host import (
    calibration_batches,
    listen_to_batches,
    run_routed_tokens_only,
    undo_with_oneshot,
)
from moeq_plugin.integrations.llm_compressor.one_run import OneRun
from moeq_plugin.models.linear_experts import linear_moe_layers
from moeq_plugin.models.moe import MoELayer, find_moe_layers


class ImportanceModifier(FrozenFields, OneRun, Modifier):
    """Compute an importance matrix for ``llama-quantize``; nothing is quantized.

    Tokens count by the router's weight, and no expert is left without: one with too few of its
    own borrows from the layer. llama.cpp's own program counts every token of an expert alike,
    and leaves experts without tokens to whoever reads the matrix. Ranks of ``torch.distributed``
    add up what each sees of its own part of the data, and all end with the same matrix.

    Args:
        dataset_name: what the matrix says that it was computed on.
        affinity_power: power of the router's combine weight that weights a token.
        min_effective_tokens: an expert with fewer borrows.
        shrinkage: how much of the missing tokens is borrowed; see :func:`shrink_toward`.
        seed: of the samples that are borrowed from.
    """

    dataset_name: str = ""
    affinity_power: float = Field(default=1.0, ge=0)
    min_effective_tokens: float = Field(default=64.0, ge=0)
    shrinkage: float = Field(default=1.0, ge=0)
    seed: int = 0
    requires_calibration_data: bool = True

    _layers: list[MoELayer] = PrivateAttr()
    _names: dict[nn.Linear, str] = PrivateAttr()
    _tokens: preflight.TokenCount = PrivateAttr()
    _calibration: Calibration = PrivateAttr()
    _columns: ColumnImportance = PrivateAttr()
    _matrix: ImportanceMatrix | None = PrivateAttr(default=None)
    _undo: ExitStack = PrivateAttr(default_factory=ExitStack)

    @property
    def matrix(self) -> ImportanceMatrix:
        """Return what was computed.

        Raises:
            RuntimeError: before calibration has ended.
        """
        if self._matrix is None:
            raise RuntimeError("there is no matrix yet: pass this modifier to oneshot")
        return self._matrix

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check model, data and names.

        Raises:
            ValueError: if llama.cpp has no names for the linears, or there are no experts or data.
        """
        check_has_experts(state.model)
        self._tokens = preflight.count_tokens(calibration_batches(state), state.model)
        check_data_differ(calibration_batches(state))
        preflight.check_finite_weights(state.model)
        self._layers = linear_moe_layers(state.model)
        self._names = target_linears(state.model, self._layers, ["Linear"], ["lm_head"])
        model_type = state.model.config.get_text_config().model_type
        tensors = tensor_names(self._names.values(), model_type)
        self._columns = ColumnImportance(
            tensors,
            min_effective_tokens=self.min_effective_tokens,
            shrinkage=self.shrinkage,
            conversion=conversion_of(state.model, self._names, tensors),
        )
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Register the hooks that accumulate second moments."""
        undo_with_oneshot(self._undo)
        self._undo.callback(self.remove_hooks)  # a failure sends no event that would remove them
        run_routed_tokens_only(state.model, self._undo)
        watch = PaddingWatch(state)
        listen_to_batches(watch, self._undo)
        self._calibration = Calibration(
            affinity_power=self.affinity_power,
            weight_gate_proj=True,
            seed=self.seed,
            padding=watch,
        )
        self._calibration.attach(state.model, self._layers, list(self._names), self.register_hook)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        """Keep what the linears' columns count that were called since the last layer."""
        names: dict[nn.Module, str] = dict(self._names.items())
        if is_distributed():
            rank_moments.sum_over_ranks(self._calibration, names)
        self._calibration.check_finite(names)
        self._columns.add(self._calibration, names)
        self._calibration.clear_layer()

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Put the matrix together and remove hooks."""
        of_ranks = gather(self._tokens)
        num_batches = sum(tokens.num_batches for tokens in of_ranks)
        num_tokens = sum(tokens.num_tokens for tokens in of_ranks)
        self._matrix = ImportanceMatrix(
            tensors=self._columns.tensors(),
            dataset=self.dataset_name,
            num_chunks=num_batches,
            chunk_size=math.ceil(num_tokens / num_batches),
            borrowed=tuple(n for n in self._names.values() if n in self._columns.borrowed),
        )
        self._undo.close()


def check_has_experts(model: nn.Module) -> None:
    """Refuse a model without routed experts, for which there is nothing to do better.

    Raises:
        ValueError: saying what to use.
    """
    if not find_moe_layers(model):
        raise ValueError(
            f"{type(model).__name__} has no routed experts that are known here; where every linear "
            "sees every token, llama.cpp's own llama-imatrix computes the same matrix: use that"
        )
