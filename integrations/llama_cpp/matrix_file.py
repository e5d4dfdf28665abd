"""llama.cpp's importance matrix on disk: what every input column of every weight counts.

For each tensor the file holds ``<name>.in_sum2``, sums of squares of each input column, and
``<name>.counts``, the tokens that were added up, one row for each expert. ``llama-quantize``
divides one by the other. Where a count is zero it takes a 1 for each column, which is how an
expert that no token has reached gets a matrix that says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moeq_plugin.integrations.llama_cpp.tensor_names import gguf_package

_SUMS, _COUNTS = ".in_sum2", ".counts"
_TYPE, _TYPE_NAME = "general.type", "imatrix"
_DATASETS, _CHUNKS = "imatrix.datasets", "imatrix.chunk_count"
_CHUNK_SIZE, _BORROWED = "imatrix.chunk_size", "moeq.borrowed"


@dataclass(frozen=True)
class Importance:
    """What the input columns of one tensor count.

    Attributes:
        mean_squares: ``[experts, in]`` float32, one row where there are no experts.
        counts: ``[experts]`` float32, tokens that a row rests on, at least 1.
    """

    mean_squares: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        if self.mean_squares.ndim != 2 or self.counts.shape != self.mean_squares.shape[:1]:
            raise ValueError(
                "expected [experts, in] mean squares and [experts] counts, got "
                f"{list(self.mean_squares.shape)} and {list(self.counts.shape)}"
            )
        if not (np.isfinite(self.mean_squares).all() and (self.mean_squares > 0).all()):
            raise ValueError("every column must count something: all mean squares are > 0")
        if not (self.counts >= 1).all():
            raise ValueError("llama.cpp takes 1 for every column of a row without tokens")


@dataclass(frozen=True)
class ImportanceMatrix:
    """A whole importance matrix.

    Attributes:
        tensors: by llama.cpp's name of the tensor.
        dataset: name of the text that it was computed on.
        num_chunks: batches of that text.
        chunk_size: tokens of each of them, on average.
        borrowed: modules that had too few tokens and were given tokens of their layer.
    """

    tensors: Mapping[str, Importance]
    dataset: str
    num_chunks: int
    chunk_size: int
    borrowed: Sequence[str] = field(default=())


def write_matrix(path: Path, matrix: ImportanceMatrix) -> None:
    """Write a matrix as ``llama-imatrix`` does.

    What was borrowed stands under a key that llama.cpp does not read.
    """
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, arch="")
    writer.kv_data[0].clear()  # of a model; a matrix names no architecture
    writer.add_string(_TYPE, _TYPE_NAME)
    writer.add_array(_DATASETS, [matrix.dataset])
    writer.add_uint32(_CHUNKS, matrix.num_chunks)
    writer.add_uint32(_CHUNK_SIZE, matrix.chunk_size)
    if matrix.borrowed:
        writer.add_array(_BORROWED, list(matrix.borrowed))
    for name, of in sorted(matrix.tensors.items()):
        sums = of.mean_squares * of.counts[:, None]
        writer.add_tensor(name + _SUMS, np.ascontiguousarray(sums, dtype=np.float32))
        writer.add_tensor(name + _COUNTS, of.counts.astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_matrix(path: Path) -> ImportanceMatrix:
    """Read a matrix that every column counts in, as :func:`write_matrix` writes it.

    Raises:
        ValueError: if the file is no matrix, or an expert of it has seen no token.
    """
    gguf = gguf_package()
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(f"{path} is not a file of llama.cpp: {error}") from error
    fields = {name: found.contents() for name, found in reader.fields.items()}
    if fields.get(_TYPE) != _TYPE_NAME:
        raise ValueError(f"{path} is not an importance matrix: {_TYPE} is {fields.get(_TYPE)!r}")
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    found = {}
    for name, sums in tensors.items():
        if name.endswith(_SUMS):
            counts = tensors[name.removesuffix(_SUMS) + _COUNTS].reshape(-1)
            if not (counts >= 1).all():
                raise ValueError(f"{path}: experts without tokens in {name}")
            rows = sums.reshape(len(counts), -1)
            found[name.removesuffix(_SUMS)] = Importance(rows / counts[:, None], counts)
    return ImportanceMatrix(
        tensors=found,
        dataset=str(fields[_DATASETS][0]),
        num_chunks=int(fields[_CHUNKS]),
        chunk_size=int(fields[_CHUNK_SIZE]),
        borrowed=tuple(fields.get(_BORROWED, ())),
    )
