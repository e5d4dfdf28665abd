"""Read what safetensors files hold without their data, and survive files that are damaged.

The format: 8 bytes little endian length, that many bytes of JSON, the data. We parse it ourselves
because a verifier has to go on where a loader gives up, and say which file and what.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from moeq_plugin.untrusted.broken import UnreadableFileError
from moeq_plugin.untrusted.patterns import MAX_NAME
from moeq_plugin.untrusted.reading import MAX_HEADER_BYTES, open_regular, parse_object

# in the order in which the library lays tensors out, last first
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_MAX_COUNT = 1 << 48
_MAX_OPEN = 32  # of a checkpoint's files at once: processes may have few
_kept_open: ContextVar[dict[Path, BufferedReader] | None] = ContextVar("kept_open", default=None)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file's header describes it.

    Attributes:
        name: its name in the file.
        dtype: code of the safetensors format, such as ``BF16``.
        shape: its shape.
        path: the file.
        begin: offset of its first byte in the file.
        num_bytes: of its data.
        is_whole: whether the file is long enough to hold them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    num_bytes: int
    is_whole: bool


def read_header(path: Path) -> list[StoredTensor]:
    """Return the tensors of a safetensors file; only its header is read.

    Raises:
        UnreadableFileError: if the header is cut off, is no JSON, or contradicts itself.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise UnreadableFileError(
                f"{path.name}: the header is to have {length} bytes, the file has {size} in all"
            )
        content = parse_object(file.read(length), path)
    content.pop("__metadata__", None)
    tensors = [_tensor(name, entry, path, 8 + length, size) for name, entry in content.items()]
    tensors.sort(key=lambda tensor: tensor.begin)
    end = 8 + length
    for tensor in tensors:
        if tensor.begin != end:
            raise UnreadableFileError(
                f"{path.name}: {tensor.name} begins at byte {tensor.begin}, the tensor before it "
                f"ends at {end}"
            )
        end += tensor.num_bytes
    return tensors


def data_end(tensors: list[StoredTensor], path: Path) -> int:
    """Return the size that a file with these tensors has to have."""
    if tensors:
        return tensors[-1].begin + tensors[-1].num_bytes
    return path.stat().st_size


def read_bytes(tensor: StoredTensor, begin: int = 0, num_bytes: int | None = None) -> bytearray:
    """Return a tensor's data, or a part of it.

    Args:
        tensor: a whole one.
        begin: first byte of the part.
        num_bytes: of the part; ``None`` for all that follow.
    """
    content = bytearray(tensor.num_bytes - begin if num_bytes is None else num_bytes)
    opened = _kept_open.get()
    if opened is None:
        with open_regular(tensor.path) as file:
            _read_into(content, file, tensor.begin + begin)
        return content
    if tensor.path not in opened:
        if len(opened) == _MAX_OPEN:
            opened.pop(next(iter(opened))).close()
        opened[tensor.path] = open_regular(tensor.path)
    _read_into(content, opened[tensor.path], tensor.begin + begin)
    return content


def _read_into(content: bytearray, file: BufferedReader, begin: int) -> None:
    file.seek(begin)
    file.readinto(content)


@contextmanager
def files_stay_open() -> Iterator[None]:
    """Open each file once for all that :func:`read_bytes` reads of it, and not for each tensor.

    Until the end a file is read as it was when it was first read, whatever takes its name.
    """
    opened: dict[Path, BufferedReader] = {}
    token = _kept_open.set(opened)
    try:
        yield
    finally:
        _kept_open.reset(token)
        for file in opened.values():
            file.close()


def shards_of(index: dict[str, Any], path: Path) -> dict[str, str]:
    """Return the file of each tensor that an index names.

    Raises:
        UnreadableFileError: if the index is not one, or names files outside of its directory.
    """
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UnreadableFileError(f"{path.name}: no `weight_map` from tensors to files")
    strange = [file for file in set(files.values()) if not _is_file_name(file)]
    if strange:
        raise UnreadableFileError(f"{path.name} names files that are none: {sorted(strange)[:3]}")
    if not all(name.isprintable() for name in files):  # such names cannot even be shown
        raise UnreadableFileError(f"{path.name}: a name is not printable")
    return files


def _is_file_name(file: str) -> bool:
    return Path(file).name == file and file not in {"", ".."} and file.isprintable()


def _tensor(name: str, entry: Any, path: Path, data: int, size: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise UnreadableFileError(f"{path.name}: {name!r} is not described by an object")
    if len(name) > MAX_NAME:
        raise UnreadableFileError(f"{path.name}: a name has {len(name)} characters")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or dtype not in BITS
        or not _counts(shape)
        or not _counts(offsets)
        or len(offsets) != 2
    ):
        raise UnreadableFileError(f"{path.name}: {name!r} has no known dtype, shape or offsets")
    num_bytes = offsets[1] - offsets[0]
    if num_bytes * 8 != math.prod(shape) * BITS[dtype]:
        raise UnreadableFileError(
            f"{path.name}: {name!r} has {num_bytes} bytes, {dtype} {shape} needs others"
        )
    begin, end = data + offsets[0], data + offsets[1]
    return StoredTensor(name, dtype, tuple(shape), path, begin, num_bytes, end <= size)


def _counts(value: Any) -> bool:
    """Tell whether a value is a short list of numbers that a file can hold."""
    if not isinstance(value, list) or len(value) > 8:
        return False
    for number in value:  # noqa: SIM110 - of every tensor, so no generator
        if type(number) is not int or not 0 <= number < _MAX_COUNT:
            return False
    return True


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
    """Return the size of length and header of a file that ``save_pretrained`` would write.

    Args:
        tensors: name, dtype and shape of each.
    """
    # the library sorts by dtype, then by name, writes JSON without spaces and pads it to 8 bytes
    order = list(BITS)
    ordered = sorted(tensors, key=lambda tensor: (-order.index(tensor[1]), tensor[0]))
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in ordered:
        begin, end = end, end + math.prod(shape) * BITS[dtype] // 8
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    length = len(json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + (length + 7) // 8 * 8
