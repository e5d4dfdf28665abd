"""What stands for each weight in codebook format, put together while a run goes on, and kept."""

from __future__ import annotations

from collections.abc import Mapping

from compressed_tensors.offload import update_offload_parameter
from loguru import logger
from torch import nn

from moeq_plugin.core.codebook import CodebookFormat, CodebookWeight
from moeq_plugin.core.packed_codebook import PackedFormat
from moeq_plugin.core.scheme_words import codebook_in_words
from moeq_plugin.integrations.llm_compressor.moequant.run_state import RunState
from moeq_plugin.integrations.llm_compressor.schemes import weight_of
from moeq_plugin.integrations.llm_compressor.unfinished import mark_changed
from moeq_plugin.records.run import Basis, LinearRecord, RunRecord


class EncodedWeights:
    """The encoded weights of one run.

    Args:
        record: filled in weight by weight.
        kept_state: where they are kept and found again, ``None`` for nowhere.

    Attributes:
        by_name: what stands for the weight of each module.
    """

    def __init__(self, record: RunRecord, kept_state: RunState | None) -> None:
        self.by_name: dict[str, CodebookWeight] = {}
        self._record, self._kept_state = record, kept_state

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
        self._take(record, module, encoded)
        if self._kept_state is not None:
            packed = PackedFormat.of(encoded).pack(encoded)
            self._kept_state.note_tensors(record, {f"{name}.packed": packed})

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
            packed = tensors[f"{name}.packed"].to(weight.device)
            encoded = form.unpack(packed, (rows, weight.numel() // rows))
            self._take(record, modules[name], encoded)
            taken.add(name)
        if taken:
            logger.info(f"{len(taken)} weights in codebooks taken over")
        return taken

    def _take(self, record: LinearRecord, module: nn.Module, encoded: CodebookWeight) -> None:
        mark_changed(module)
        update_offload_parameter(module, "weight", encoded.decode().view_as(weight_of(module)))
        self.by_name[record.name] = encoded
        self._record.linears.append(record)
