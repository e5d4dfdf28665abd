"""Rounding to llama.cpp's types by llama.cpp's own code, and back.

Rounding is ``ggml_quantize_chunk`` of its library; gguf-py has the inverse, and the sizes.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import shutil
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from moeq_plugin.integrations.llama_cpp.tensor_names import gguf_package

_LIBRARY = "ggml-base"
_PROGRAM = "llama-quantize"
_PACKAGE = "llama_cpp"  # llama-cpp-python, which brings the library along
_SUFFIXES = (".so", ".dylib", ".dll")


def block_of(type_name: str) -> tuple[int, int]:
    """Return the columns of a block of this type and the bytes that it takes.

    Raises:
        ValueError: if llama.cpp has no such type.

    Example:
        >>> block_of("Q4_K")
        (256, 144)
    """
    gguf = gguf_package()
    types = gguf.GGMLQuantizationType
    if type_name not in types.__members__:
        known = ", ".join(t.name for t in gguf.GGML_QUANT_SIZES if gguf.GGML_QUANT_SIZES[t][0] > 1)
        raise ValueError(f"{type_name!r} is not a type of llama.cpp; there are {known}")
    columns, num_bytes = gguf.GGML_QUANT_SIZES[types[type_name]]
    return int(columns), int(num_bytes)


def quantize(weight: np.ndarray, type_name: str, column_weights: np.ndarray | None) -> np.ndarray:
    """Round a matrix as ``llama-quantize`` does.

    Args:
        weight: ``[out, in]`` float32.
        type_name: such as ``Q4_K``.
        column_weights: ``[in]`` float32, what the columns count; ``None`` without a matrix.

    Returns:
        ``[out, bytes]`` uint8.

    Raises:
        ValueError: if the type's blocks do not divide the columns, or the library is missing.
    """
    columns, num_bytes = block_of(type_name)
    rows, width = weight.shape
    if width % columns:
        raise ValueError(f"blocks of {columns} columns ({type_name}) do not divide {width} columns")
    source = np.ascontiguousarray(weight, dtype=np.float32)
    out = np.empty((rows, width // columns * num_bytes), dtype=np.uint8)
    counts = None
    if column_weights is not None:
        counts = np.ascontiguousarray(column_weights, dtype=np.float32)
    number = int(gguf_package().GGMLQuantizationType[type_name])
    written = _library().ggml_quantize_chunk(
        number, _pointer(source), _pointer(out), 0, rows, width, _pointer(counts)
    )
    if written != out.nbytes:
        raise ValueError(f"llama.cpp wrote {written} bytes of {type_name}, expected {out.nbytes}")
    return out


def dequantize(stored: np.ndarray, type_name: str) -> np.ndarray:
    """Return ``[out, in]`` float32 of what :func:`quantize` returns."""
    gguf = gguf_package()
    found: np.ndarray = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[type_name])
    return found


def check_library() -> None:
    """Refuse to begin what needs llama.cpp's library where there is none; see :func:`quantize`."""
    _library()


@cache
def _library() -> ctypes.CDLL:
    """Load llama.cpp's library.

    Raises:
        ValueError: saying where it was looked for.
    """
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError:  # built for another machine
            continue
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        library.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        return library
    raise ValueError(
        f"what a type loses is measured with llama.cpp's own library, lib{_LIBRARY}, which is "
        f"neither beside {_PROGRAM} on the PATH nor in a package {_PACKAGE} nor where the system "
        "keeps its libraries: install llama.cpp, or pip install llama-cpp-python"
    )


def _candidates() -> Iterator[str]:
    directories = []
    program = shutil.which(_PROGRAM)
    if program is not None:
        beside = Path(program).resolve().parent
        directories += [beside, beside.parent / "lib"]
    package = find_spec(_PACKAGE)
    if package is not None and package.origin is not None:
        directories.append(Path(package.origin).parent / "lib")
    for directory in directories:
        for suffix in _SUFFIXES:
            found = directory / f"lib{_LIBRARY}{suffix}"
            if found.is_file():
                yield str(found)
    system = ctypes.util.find_library(_LIBRARY)
    if system is not None:
        yield system


def _pointer(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data
