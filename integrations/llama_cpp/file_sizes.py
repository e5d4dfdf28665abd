"""How many bytes ``llama-quantize`` will write, to the byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeq_plugin.integrations.llama_cpp.ggml import block_of
from moeq_plugin.integrations.llama_cpp.tensor_names import gguf_package

# llama-quantize writes both into every file
_ALWAYS: Mapping[str, str | int] = {"general.quantization_version": 0, "general.file_type": 0}
# of matrices, what llama-quantize leaves as it is in every family
_KEPT = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d.weight")
_LISTED = 3
_DIMENSION = 8  # bytes of one in the header
_LONGEST = 127  # bytes that llama.cpp keeps of a string


def file_size(source: Path, types: Mapping[str, str], added: Mapping[str, str | int]) -> int:
    """Return the bytes of the file that ``llama-quantize`` will write.

    Args:
        source: the file that it will read.
        types: of the tensors that it will quantize; all others stay what they are.
        added: what it will add to the metadata, beside what it always does.

    Raises:
        ValueError: if it is no file of llama.cpp, or has matrices that ``types`` does not name.
    """
    reader = _open(source)
    unnamed = _unnamed(reader, types)
    if unnamed:
        raise ValueError(
            f"{source} has {len(unnamed)} matrices whose type is left to llama.cpp, such as "
            f"{', '.join([*unnamed][:_LISTED])}: the size of its file is not known"
        )
    last = reader.tensors[-1].field
    header = last.offset + sum(part.nbytes for part in last.parts)
    # and dimensions of 1 at the end of a shape are not written again
    header -= _DIMENSION * sum(
        len(tensor.shape) - _num_dimensions(tensor) for tensor in reader.tensors
    )
    for key, value in {**_ALWAYS, **added}.items():
        if key not in reader.fields:
            header += _pair_bytes(key, value)
    total = _padded(header, reader.alignment)
    for tensor in reader.tensors:
        num_bytes = int(tensor.n_bytes)
        if tensor.name in types:
            columns, block_bytes = block_of(types[tensor.name])
            num_bytes = int(tensor.n_elements) // columns * block_bytes
        total += _padded(num_bytes, reader.alignment)
    return total


def left_as_they_are(source: Path, types: Mapping[str, str]) -> dict[str, str]:
    """Return the types that matrices without a type have in a file, which they are to keep.

    Args:
        source: the file that ``llama-quantize`` will read.
        types: of the tensors that it will quantize.

    Raises:
        ValueError: if it is no file of llama.cpp.
    """
    return _unnamed(_open(source), types)


def _open(source: Path) -> Any:
    gguf = gguf_package()
    try:
        return gguf.GGUFReader(source)
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(f"{source} is not a file of llama.cpp: {error}") from error


def _unnamed(reader: Any, types: Mapping[str, str]) -> dict[str, str]:
    """Return the matrices whose type would be left to llama.cpp, with that of the file."""
    return {
        tensor.name: tensor.tensor_type.name
        for tensor in reader.tensors
        if _num_dimensions(tensor) > 1
        and tensor.name not in types
        and not tensor.name.endswith(_KEPT)
    }


def _num_dimensions(tensor: Any) -> int:
    """Return how many dimensions llama.cpp takes a tensor to have."""
    sizes = [int(size) for size in tensor.shape]  # columns first
    while len(sizes) > 1 and sizes[-1] == 1:
        sizes.pop()
    return len(sizes)


def matrix_pairs(matrix: str, dataset: str, entries: int, chunks: int) -> dict[str, str | int]:
    """Return what ``llama-quantize --imatrix`` adds to the metadata.

    Args:
        matrix: the path, as it was given.
        dataset: that the matrix names.
        entries: tensors in it.
        chunks: that it was computed on.
    """
    return {
        "quantize.imatrix.file": matrix.encode()[:_LONGEST].decode(errors="replace"),
        "quantize.imatrix.dataset": dataset.encode()[:_LONGEST].decode(errors="replace"),
        "quantize.imatrix.entries_count": entries,
        "quantize.imatrix.chunks_count": chunks,
    }


def _pair_bytes(key: str, value: str | int) -> int:
    """Return the bytes of one entry of the metadata: key, kind, and a string or a 32-bit number."""
    num_bytes = 8 + len(key.encode()) + 4
    return num_bytes + (8 + len(value.encode()) if isinstance(value, str) else 4)


def _padded(num_bytes: int, alignment: int) -> int:
    return -(-num_bytes // alignment) * alignment
