"""What the files of a checkpoint hold: bytes, weights, and true bits per quantized weight.

Reads the headers of safetensors files, and of their contents only the shapes of packed weights.
Standard library only.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moeq_plugin.checkpoint.codebooks import METHOD, shape_of, split_section
from moeq_plugin.checkpoint.headers import StoredTensor, read_bytes, read_header
from moeq_plugin.checkpoint.weight_files import weight_files
from moeq_plugin.untrusted.broken import UnreadableFileError
from moeq_plugin.untrusted.reading import read_json

_PACKED = "packed"  # a weight in codebook format
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
    """Add up the files of weights of a directory; ``None`` if there are none.

    Raises:
        ValueError: if a file is not a safetensors file.
    """
    modules: dict[str, dict[str, StoredTensor]] = {}
    for path in weight_files(directory):
        for tensor in _tensors(path):
            module, _, name = tensor.name.rpartition(".")
            modules.setdefault(module, {})[name] = tensor
    if not modules:
        return None
    coded = _codebook_weights(directory)
    total = weights = quantized_bytes = quantized_weights = 0
    for module, tensors in modules.items():
        if module in coded and _PACKED in tensors:
            # the bias, if there is one, is counted below
            num_bytes = tensors.pop(_PACKED).num_bytes
            total, quantized_bytes = total + num_bytes, quantized_bytes + num_bytes
            weights, quantized_weights = weights + coded[module], quantized_weights + coded[module]
        of_weight = {n: t for n, t in tensors.items() if n == "weight" or n.startswith(_OF_WEIGHT)}
        others = [t for n, t in tensors.items() if n not in of_weight]
        count, own = _num_weights(of_weight), sum(t.num_bytes for t in of_weight.values())
        total += own + sum(t.num_bytes for t in others)
        weights += count + sum(math.prod(t.shape) for t in others)
        if any(n.startswith(_OF_WEIGHT) for n in of_weight):
            quantized_bytes, quantized_weights = quantized_bytes + own, quantized_weights + count
    return Stored(total, weights, quantized_bytes, quantized_weights)


def _codebook_weights(directory: Path) -> dict[str, int]:
    """Return how many weights each codebook module of ours stands for, where that is known.

    Raises:
        ValueError: if the configuration is broken.
    """
    path = directory / "config.json"
    config = read_json(path) if path.exists() else {}
    section = config.get("quantization_config")
    if not isinstance(section, dict) or section.get("quant_method") != METHOD:
        return {}
    shapes = {name: shape_of(name, config) for name in split_section(section)[0]}
    return {name: math.prod(shape) for name, shape in shapes.items() if shape is not None}


def _tensors(path: Path) -> list[StoredTensor]:
    try:
        return read_header(path)
    except UnreadableFileError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _num_weights(of_weight: Mapping[str, StoredTensor]) -> int:
    """Return how many weights the tensors stand for that store one matrix.

    Raises:
        ValueError: if the shape of a packed weight is not in the file.
    """
    if "weight_shape" in of_weight:  # packed integers: its content is the shape of the weight
        return math.prod(_numbers(of_weight["weight_shape"]))
    if "weight" in of_weight:
        return math.prod(of_weight["weight"].shape)
    packed = of_weight.get("weight_packed")  # four-bit floats, two to a byte
    return 2 * math.prod(packed.shape) if packed is not None else 0


def _numbers(tensor: StoredTensor) -> tuple[int, ...]:
    letter = {"I32": "i", "I64": "q"}.get(tensor.dtype)
    if letter is None or not tensor.is_whole:
        raise ValueError(f"{tensor.path.name}: {tensor.name} cannot be read")
    return struct.unpack(f"<{math.prod(tensor.shape)}{letter}", read_bytes(tensor))
