"""What stands for each weight in codebook format, put together while a run goes on, and kept."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.offload import update_offload_parameter
from loguru import logger
from torch import nn
from transformers import PreTrainedModel

from moeq_plugin.core.codebook import CodebookFormat, CodebookWeight
from moeq_plugin.core.packed_codebook import PackedFormat
from moeq_plugin.core.scheme_words import codebook_in_words
from moeq_plugin.integrations.llm_compressor.moequant.run_state import RunState
from moeq_plugin.integrations.llm_compressor.rwkv.saving import PackedWords, keep_packed
from moeq_plugin.integrations.llm_compressor.schemes import weight_of
from moeq_plugin.integrations.llm_compressor.unfinished import mark_changed
from moeq_plugin.records.run import Basis, LinearRecord, RunRecord


class EncodedWeights:
    """The encoded weights of one run, packed as soon as they are there.

    Args:
        record: filled in weight by weight.
        kept_state: where they are kept and found again, ``None`` for nowhere.
    """

    def __init__(self, record: RunRecord, kept_state: RunState | None) -> None:
        self._record, self._kept_state = record, kept_state
        self._packed: dict[str, PackedWords] = {}  # whose modules still run on decoded weights

    def put(
        self,
        name: str,
        module: nn.Module,
        encoded: CodebookWeight,
        basis: Basis,
        effective_tokens: float,
        loss: float | None,
    ) -> None:
        """Let a module run on its encoded weight from now on, and write down what was done.

        Args:
            name: of the module.
            module: a linear or an element-wise weight.
            encoded: what stands for its weight.
            basis: what it was fitted to.
            effective_tokens: that its fit rests on.
            loss: see :class:`LinearRecord`.
        """
        form = encoded.form
        scheme = codebook_in_words(
            form.index_bits, form.vector_dim, form.group_rows, form.group_columns
        )
        record = LinearRecord(name, scheme, basis, effective_tokens, loss)
        packed = PackedWords.of(encoded)
        self._take(record, module, encoded, packed)
        if self._kept_state is not None:
            self._kept_state.note_tensors(record, {f"{name}.packed": packed.words})

    def restore(
        self, modules: Mapping[str, nn.Module], forms: Mapping[str, CodebookFormat]
    ) -> set[str]:
        """Take over what an earlier process has encoded of these modules.

        Args:
            modules: by name, with their 16-bit weights.
            forms: the format of each.

        Returns:
            The names of those that were taken over.

        Raises:
            ValueError: if a file is not what was kept.
        """
        if self._kept_state is None:
            return set()
        taken = set()
        for record, tensors in self._kept_state.kept_tensors(modules):
            name = record.name
            weight = weight_of(modules[name])
            # an element-wise weight is one row
            rows = len(weight) if isinstance(modules[name], nn.Linear) else 1
            form = PackedFormat.to_store(forms[name], weight.dtype)
            words = tensors[f"{name}.packed"].to(weight.device)
            encoded = form.unpack(words, (rows, weight.numel() // rows))
            self._take(record, modules[name], encoded, PackedWords(form, words))
            taken.add(name)
        if taken:
            logger.info(f"{len(taken)} weights in codebooks taken over")
        return taken

    def replace(self, model: PreTrainedModel, names: Container[str] | None = None) -> None:
        """Replace modules that run on decoded weights by packed ones, in place.

        Args:
            model: the model.
            names: of modules; those that are not encoded stay. ``None`` for all.
        """
        done = [name for name in self._packed if names is None or name in names]
        keep_packed(model, {name: self._packed.pop(name) for name in done})
        for name in done:
            mark_changed(model.get_submodule(name))

    def _take(
        self, record: LinearRecord, module: nn.Module, encoded: CodebookWeight, packed: PackedWords
    ) -> None:
        mark_changed(module)
        _run_on(module, encoded.decode().view_as(weight_of(module)))
        self._packed[record.name] = packed
        self._record.linears.append(record)


def _run_on(module: nn.Module, decoded: torch.Tensor) -> None:
    """Let a module run on another weight of the same shape.

    What is written into a mapped file takes memory until all of the file goes. So nothing is
    written to the weight: another takes its place.
    """
    if is_distributed():  # ranks share the memory of weights
        update_offload_parameter(module, "weight", decoded)
        return
    del module.weight
    module.weight = nn.Parameter(decoded, requires_grad=False)
