"""What llama.cpp makes of our importance matrices and types, at equal bytes.

    make llama && python benchmarks/llama_cpp.py [--seeds 3] [--models NAME ...] [--out FILE]

Writes ``benchmarks/results/llama_cpp.json`` after every file and goes on where it was stopped.
llama.cpp's own program quantizes; its files are read back into the 16-bit model and measured on
held-out text. Embeddings have one type in all files of a model. "llama.cpp's" matrix is what its
own program computes: every token of an expert counts alike, and an expert without tokens has ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import gguf
import numpy as np
import torch
from corpora import Corpus, corpora
from gguf_model import put_in, write_gguf
from llmcompressor import oneshot
from peer_evaluation import load_reference, quantized_linears
from real_llama import PROGRAMS, quantize
from transformers import AutoModelForCausalLM, PreTrainedModel

from moeq_plugin.core.allocation import BitBudget, allocate_bits
from moeq_plugin.core.sensitivity import SensitivityTable
from moeq_plugin.integrations.llama_cpp.file_sizes import file_size, matrix_pairs
from moeq_plugin.integrations.llama_cpp.ggml import block_of
from moeq_plugin.integrations.llama_cpp.matrix_file import ImportanceMatrix, write_matrix
from moeq_plugin.integrations.llama_cpp.modifier import ImportanceModifier
from moeq_plugin.integrations.llama_cpp.sensitivity import TypeSensitivityModifier
from moeq_plugin.integrations.llama_cpp.tensor_names import tensor_names
from moeq_plugin.integrations.llama_cpp.tensor_types import DEFAULT_TYPES, embedding_type
from moeq_plugin.integrations.llama_cpp.type_files import (
    chosen_types,
    with_embeddings,
    write_types,
)
from moeq_plugin.models.evaluation import evaluate

RESULT = Path(__file__).parent / "results" / "llama_cpp.json"
# sequences and tokens of each: enough text for every expert, and so little that some see none
CALIBRATION = ((64, 256), (1, 64))
LENGTH, HELDOUT = 256, 32
# no type below 4 bits fits 128 columns, which is what the shipped model has
TYPES = {
    "tiny_moe": (("Q4_0", "IQ4_NL", "Q4_1"), ("IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")),
    "moe_small": (
        ("Q2_K", "IQ2_S", "IQ3_S", "Q3_K_M mixture", "Q3_K"),
        DEFAULT_TYPES,
    ),
}
MIXTURE = " mixture"  # of types, by llama.cpp's rules: what its users get by default
# what the program calls a file whose tensors have all their types from us
FILE_TYPES = {"Q3_K": "Q3_K_S", "IQ2_S": "IQ2_M"}
NEED_MATRIX = ("IQ2_S",)
# which of them are also quantized after hardly any text
SCARCE = ("Q4_0", "Q2_K", "IQ2_S")
NO_MATRIX, THEIRS, OURS, ALLOCATED = "none", "llama.cpp's", "ours", "ours, types allocated"


class Case:
    """One model on one draw of calibration text."""

    def __init__(
        self, corpus: Corpus, seed: int, calibration: tuple[int, int], directory: Path
    ) -> None:
        self.corpus, self.seed, self.calibration = corpus, seed, calibration
        self.directory = directory
        self._allocated: dict[frozenset[tuple[str, str]], dict[str, object]] = {}
        self.source = directory / "source.gguf"
        write_gguf(corpus.model, self.source)

    @cached_property
    def matrices(self) -> dict[str, ImportanceMatrix | None]:
        """Return the matrices to quantize with, by name."""
        ours = ImportanceModifier(seed=self.seed, dataset_name=self.corpus.name)
        plain = {"affinity_power": 0, "min_effective_tokens": 0, "shrinkage": 0}
        theirs = ImportanceModifier(seed=self.seed, dataset_name=self.corpus.name, **plain)
        for modifier in (ours, theirs):
            self._calibrate(modifier)
        alike = _without_borrowing(theirs.matrix, self._tensors)
        return {NO_MATRIX: None, THEIRS: alike, OURS: ours.matrix}

    @cached_property
    def table(self) -> SensitivityTable:
        """Return what every linear loses at every type."""
        modifier = TypeSensitivityModifier(options=list(TYPES[self.corpus.name][1]), seed=self.seed)
        self._calibrate(modifier)
        return modifier.table

    def pairs(self, is_allocated: bool) -> list[tuple[str, str]]:
        """Return what to run: the bytes of which type, and what makes the file."""
        return [
            (name, matrix)
            for name in TYPES[self.corpus.name][0]
            for matrix in self._columns(name)
            if (matrix == ALLOCATED) == is_allocated
        ]

    def _columns(self, name: str) -> list[str]:
        if self.calibration != CALIBRATION[0]:
            return [THEIRS, OURS] if name in SCARCE else []
        # without a matrix there are no data, and seeds do not differ
        needs_none = self.seed == 0 and name not in NEED_MATRIX
        return [*([NO_MATRIX] if needs_none else []), THEIRS, OURS, ALLOCATED]

    def run(self, matrix: str, name: str) -> dict[str, object]:
        """Quantize with llama.cpp and measure."""
        used = self.matrices[OURS if matrix == ALLOCATED else matrix]
        types = self._types(matrix, name)
        if matrix == ALLOCATED:  # of the same size: the same choice, and the same file
            chosen = frozenset((types or {}).items())
            known = self._allocated.setdefault(chosen, {})
            if known:
                return {**known, "bytes_of": name}
        out = self.write(used, name, types)
        result = evaluate(self._quantized(out), self._reference, self._heldout)
        found = {
            "model": self.corpus.name,
            "seed": self.seed,
            "tokens": math.prod(self.calibration),
            "bytes_of": name,
            "matrix": matrix,
            "file_bytes": out.stat().st_size,
            "types": dict(Counter(self._types_in(out).values())),
            "few_tokens": 0 if used is None else len(used.borrowed),
            "kl": result.kl,
            "perplexity": result.perplexity,
            "reference_perplexity": result.reference_perplexity,
        }
        if matrix == ALLOCATED:
            known |= found
        return found

    def write(
        self, matrix: ImportanceMatrix | None, name: str, types: Mapping[str, str] | None
    ) -> Path:
        """Let ``llama-quantize`` write a file, and check its size where types are given."""
        out, listed = self.directory / "out.gguf", self.directory / "types.txt"
        width = self._reference.config.hidden_size
        arguments: list[object] = ["--token-embedding-type", embedding_type(width)]
        arguments += ["--output-tensor-type", embedding_type(width)]
        if types is not None:
            write_types(listed, types)
            arguments += ["--tensor-type-file", listed]
        added: dict[str, str | int] = {}
        if matrix is not None:
            path = self.directory / "matrix.gguf"
            write_matrix(path, matrix)
            arguments += ["--imatrix", path]
            added = matrix_pairs(str(path), matrix.dataset, len(matrix.tensors), matrix.num_chunks)
        file_type = FILE_TYPES.get(name, name.removesuffix(MIXTURE))
        quantize(self.source, out, file_type, *arguments)
        if types is not None:
            predicted = file_size(self.source, with_embeddings(types, width), added)
            assert predicted == out.stat().st_size, (predicted, out.stat().st_size)
        return out

    def _types(self, matrix: str, name: str) -> dict[str, str] | None:
        """Return the type of each tensor, ``None`` for a mixture, which llama.cpp chooses."""
        if matrix == ALLOCATED:
            found = allocate_bits(self.table, self._budget(name), target="gguf")
            return chosen_types(found.choice, self._tensors)
        return None if name.endswith(MIXTURE) else dict.fromkeys(self._tensors.values(), name)

    def _budget(self, name: str) -> BitBudget:
        if not name.endswith(MIXTURE):
            columns, num_bytes = block_of(name)
            return BitBudget(bits_per_weight=8 * num_bytes / columns)
        types = self._types_in(self.write(self.matrices[THEIRS], name, None))
        weights = dict.fromkeys(types, 0)
        for module, count in zip(self.table.rows, self.table.num_weights, strict=True):
            weights[self._tensors[module]] += int(count)
        bits = sum(
            n * 8 * block_of(types[t])[1] / block_of(types[t])[0] for t, n in weights.items()
        )
        return BitBudget(bits_per_weight=bits / sum(weights.values()))

    def _types_in(self, path: Path) -> dict[str, str]:
        stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
        return {tensor: stored[tensor] for tensor in self._tensors.values()}

    @cached_property
    def _reference(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.corpus.model, dtype=torch.float32)

    @cached_property
    def _heldout(self) -> list[torch.Tensor]:
        return self.corpus.heldout_batches(HELDOUT, LENGTH)

    @cached_property
    def _tensors(self) -> dict[str, str]:
        config = self._reference.config
        linears = quantized_linears(load_reference(self.corpus.model))
        return tensor_names(linears, config.model_type)

    def _quantized(self, path: Path) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.corpus.model, dtype=torch.float32)
        put_in(model, path)
        return model

    def _calibrate(self, modifier: ImportanceModifier | TypeSensitivityModifier) -> None:
        sequences, length = self.calibration
        oneshot(
            model=AutoModelForCausalLM.from_pretrained(self.corpus.model, dtype=torch.float32),
            recipe=modifier,
            dataset=self.corpus.calibration_set(sequences, length, self.seed),
            num_calibration_samples=sequences,
            max_seq_length=length,
            batch_size=8,
        )


def _without_borrowing(matrix: ImportanceMatrix, tensors: Mapping[str, str]) -> ImportanceMatrix:
    """Return a matrix with ones for the experts that borrowed, as llama.cpp fills them in."""
    found = {}
    for name, of in matrix.tensors.items():
        members = [module for module, tensor in tensors.items() if tensor == name]
        borrowed = np.array([module in matrix.borrowed for module in members])
        rows = np.where(borrowed[:, None], 1, of.mean_squares).astype(np.float32)
        found[name] = replace(of, mean_squares=rows)
    return replace(matrix, tensors=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=list(TYPES))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PATH"] = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"  # its library lies there
    runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    done = {(r["model"], r["seed"], r["tokens"], r["bytes_of"], r["matrix"]) for r in runs}
    # what needs no table first, for all seeds: measuring one takes longest
    cases = itertools.product((False, True), range(arguments.seeds), CALIBRATION, corpora())
    for is_allocated, seed, calibration, corpus in cases:
        if corpus.name not in arguments.models:
            continue
        with tempfile.TemporaryDirectory() as directory:
            case = Case(corpus, seed, calibration, Path(directory))
            for name, matrix in case.pairs(is_allocated):
                if (corpus.name, seed, math.prod(calibration), name, matrix) in done:
                    continue
                began = time.monotonic()
                runs.append(case.run(matrix, name))
                print(f"{time.monotonic() - began:.0f} s: {runs[-1]}", flush=True)
                content = {"length": LENGTH, "heldout": HELDOUT, "runs": runs}
                arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
