"""What the files of a checkpoint hold: bytes, weights, and true bits per quantized weight.

Reads the headers of safetensors files, and of their contents only the shapes of packed weights.
Standard library only.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_OF_WEIGHT = "weight_"  # what is stored beside or instead of a weight: weight_scale and so on


@dataclass(frozen=True)
class Stored:
    """Sizes of a checkpoint.

    Attributes:
        num_bytes: of all tensors.
        num_weights: parameters of the model, however they are stored.
        quantized_bytes: of all that is stored for quantized weights, scales included.
        quantized_weights: how many weights that are.
    """

    num_bytes: int
    num_weights: int
    quantized_bytes: int
    quantized_weights: int

    @property
    def bits_per_weight(self) -> float | None:
        """Return true bits per quantized weight, ``None`` if nothing is quantized."""
        return 8 * self.quantized_bytes / self.quantized_weights if self.quantized_weights else None

    @property
    def quantized_share(self) -> float:
        """Return which share of the parameters is quantized."""
        return self.quantized_weights / self.num_weights if self.num_weights else 0.0


def read_stored(directory: Path) -> Stored | None:
    """Add up the safetensors files of a directory; ``None`` if there are none.

    Raises:
        ValueError: if a file is not a safetensors file.
    """
    modules: dict[str, dict[str, tuple[dict[str, Any], list[int]]]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        for key, entry, shape in _tensors(path):
            module, _, name = key.rpartition(".")
            modules.setdefault(module, {})[name] = entry, shape
    if not modules:
        return None
    total = weights = quantized_bytes = quantized_weights = 0
    for tensors in modules.values():
        of_weight = [n for n in tensors if n == "weight" or n.startswith(_OF_WEIGHT)]
        is_quantized = any(n.startswith(_OF_WEIGHT) for n in of_weight)
        size = sum(_num_bytes(entry) for entry, _ in tensors.values())
        own = sum(_num_bytes(tensors[n][0]) for n in of_weight)
        other = sum(math.prod(shape) for n, (_, shape) in tensors.items() if n not in of_weight)
        count = _weights_of(tensors)
        total, weights = total + size, weights + count + other
        if is_quantized:
            quantized_bytes, quantized_weights = quantized_bytes + own, quantized_weights + count
    return Stored(total, weights, quantized_bytes, quantized_weights)


def _weights_of(tensors: dict[str, tuple[dict[str, Any], list[int]]]) -> int:
    if "weight_shape" in tensors:  # packed integers: its content is the shape of the weight
        return math.prod(tensors["weight_shape"][1])
    if "weight" in tensors:
        return math.prod(tensors["weight"][1])
    packed = tensors.get("weight_packed")  # four-bit floats, two to a byte
    return 2 * math.prod(packed[1]) if packed is not None else 0


def _tensors(path: Path) -> Iterator[tuple[str, dict[str, Any], list[int]]]:
    """Yield name, header entry and shape of each tensor; of a ``weight_shape`` its content.

    Raises:
        ValueError: if the file is not a safetensors file.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _MAX_HEADER:
            raise ValueError(f"{path} is not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            is_shape = key.endswith(".weight_shape")
            yield key, entry, _content(file, 8 + length, entry) if is_shape else entry["shape"]


def _content(file: BinaryIO, start: int, entry: dict[str, Any]) -> list[int]:
    begin, end = entry["data_offsets"]
    file.seek(start + begin)
    width, form = {"I32": (4, "i"), "I64": (8, "q")}[entry["dtype"]]
    return list(struct.unpack(f"<{(end - begin) // width}{form}", file.read(end - begin)))


def _num_bytes(entry: dict[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    return int(end - begin)
