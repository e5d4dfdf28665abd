"""What a ``quantization_config`` of ours says of weights in codebooks (``quant_method: moeq``).

The other weights of such a checkpoint are described under ``scalar``, by a section of
compressed-tensors, which is what everybody else here reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeq_plugin.core.scheme_words import codebook_in_words

METHOD = "moeq"
VERSIONS = (2, 3)
_FIELDS = {"index_bits": 12, "vector_dim": 8, "group_rows": 1 << 20, "group_columns": 1 << 20}
_SCALE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Codebooks:
    """How one weight is stored.

    Attributes:
        index_bits: bits of an index.
        vector_dim: columns that share one.
        group_rows: rows that share a codebook.
        group_columns: columns that share it.
        scale_dtype: name of the dtype of the scales, that of the model.
    """

    index_bits: int
    vector_dim: int
    group_rows: int
    group_columns: int
    scale_dtype: str

    @classmethod
    def of(cls, *fields: int, scale_dtype: str = "bfloat16") -> Codebooks:
        """Return the format with these fields, in their order.

        Raises:
            ValueError: if there is none.
        """
        group = dict(zip(_FIELDS, fields, strict=True), scale_dtype=scale_dtype)
        return _codebooks("codebook format", group)

    def describe(self) -> str:
        """Return the format in words."""
        return codebook_in_words(
            self.index_bits, self.vector_dim, self.group_rows, self.group_columns
        )

    def num_words(self, shape: tuple[int, int]) -> int:
        """Return the 32-bit words of a weight of ``shape``."""
        rows, columns = shape
        tiles = math.ceil(rows / self.group_rows) * math.ceil(columns / self.group_columns)
        indices = math.ceil(rows * columns / (32 * self.vector_dim)) * self.index_bits
        per_tile = (self.vector_dim << self.index_bits) + _SCALE_BYTES[self.scale_dtype]
        return indices + math.ceil(tiles * per_tile / 4)


def split_section(section: Mapping[str, Any]) -> tuple[dict[str, Codebooks], Any]:
    """Return the codebooks of a section by module, and what it says of scalar weights.

    Raises:
        ValueError: if it is of a version that nobody here reads, or is no such section.
    """
    version = section.get("format_version")
    if version not in VERSIONS:
        raise ValueError(
            f"config.json: format_version {ascii(version)} of codebooks is not one of "
            f"{', '.join(map(str, VERSIONS))}, which are read here"
        )
    groups = section.get("codebooks")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("config.json: quantization_config.codebooks must be a list of objects")
    found: dict[str, Codebooks] = {}
    for number, group in enumerate(groups):
        where = f"config.json: quantization_config.codebooks[{number}]"
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise ValueError(f"{where}.targets must be a list of names")
        found |= dict.fromkeys(targets, _codebooks(where, group))
    return found, section.get("scalar")


def _codebooks(where: str, group: Mapping[str, Any]) -> Codebooks:
    for name, high in _FIELDS.items():
        value = group.get(name)
        if type(value) is not int or not 1 <= value <= high:
            raise ValueError(f"{where}.{name} must be 1 to {high}, got {ascii(value)}")
    if group["group_columns"] % group["vector_dim"]:
        raise ValueError(f"{where}: vector_dim does not divide group_columns")
    if group.get("scale_dtype") not in tuple(_SCALE_BYTES):
        raise ValueError(f"{where}.scale_dtype {ascii(group.get('scale_dtype'))} is not known")
    return Codebooks(**{name: group[name] for name in _FIELDS}, scale_dtype=group["scale_dtype"])


_LAYER_PART = re.compile(r"model\.blocks\.\d+\.(att|ffn)\.([a-z_0-9]+)(?:\.\d+)?")
_SQUARE = ("receptance", "key", "value", "output", "gate")
_RANKS = {
    "w1": "decay_low_rank_dim", "a1": "a_low_rank_dim", "v1": "v_low_rank_dim",
    "g1": "gate_low_rank_dim", "time_decay_w1": "decay_low_rank_dim",
    "time_maa_w2": "maa_low_rank_dim",
}  # fmt: skip


def shape_of(name: str, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the matrix that an RWKV's weight is encoded as, ``None`` if that is not known.

    Args:
        name: of the module.
        config: of the checkpoint; missing sizes make the shape unknown.
    """
    match, hidden = _LAYER_PART.fullmatch(name), config.get("hidden_size")
    if match is None or type(hidden) is not int:
        return None
    mix, part = match.groups()
    inner = config.get("intermediate_size")
    if mix == "ffn" and part in ("key", "value"):
        if type(inner) is not int:
            return None
        return (inner, hidden) if part == "key" else (hidden, inner)
    if part in _SQUARE:
        return hidden, hidden
    if part == "time_maa_w1":
        rank = config.get("maa_low_rank_dim")
        return (5 * rank, hidden) if type(rank) is int else None
    rank = config.get(_RANKS.get(part, _RANKS.get(part.replace("2", "1"), "")))
    if type(rank) is int:
        is_first = part.endswith("1")
        return (rank, hidden) if is_first else (hidden, rank)
    return 1, hidden  # what is multiplied element by element
