"""Are the numbers in floats sane: finite, of a size that weights have, not all alike, not dead?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from moeq_plugin.checkpoint.checks.findings import Finding, error
from moeq_plugin.checkpoint.codes import pieces, read_tensor
from moeq_plugin.checkpoint.headers import StoredTensor

_LARGEST, _SMALLEST = 1e8, 1e-20  # of any weight, of the largest one of a tensor
_DEAD_SHARE = 1 / 8  # of rows or columns; vocabularies are padded with fewer
_DEAD = 1e-6  # beside nearly the largest row
_MIN_ROWS = 8  # fewer may well be zero
# norms that add 1 to what is stored begin at 0
_CENTERED_AT_ZERO = ("gemma", "qwen3_next", "qwen3_5", "qwen4_exp", "step3p7", "minimax_m3")


def check_floats(tensor: StoredTensor, family: str) -> Iterator[Finding]:
    """Yield what is wrong with a tensor of floats that are no scales.

    Args:
        tensor: a whole one.
        family: the config's model type.
    """
    found = _Sizes()
    for part in pieces(tensor):
        found.add(part.float())
    if not found.is_finite:
        yield error("non-finite", tensor.name, "NaN or infinity")
        return
    largest = max(abs(found.low), abs(found.high)) if found.rows else 0.0
    if largest > _LARGEST or 0 < largest < _SMALLEST:
        yield error("magnitude", tensor.name, f"the largest element is {largest:.3g}")
    elif len(tensor.shape) >= 2 and found.low == found.high:
        check = "zeroed" if found.low == 0 else "constant"
        yield error(check, tensor.name, f"every element is {found.low:.4g}")
    elif len(tensor.shape) == 2 and tensor.name.endswith(".weight"):
        yield from found.dead(tensor)
    elif len(tensor.shape) == 3 and ".experts." in tensor.name:
        zero = (torch.cat(found.rows) == 0).nonzero().flatten().tolist()
        if zero:
            yield error("zeroed", tensor.name, f"every element of experts {zero[:5]} is 0")
    elif _is_norm(tensor.name) and not _begins_at_zero(family):
        zeros = int((read_tensor(tensor) == 0).sum())
        if zeros > tensor.shape[0] * _DEAD_SHARE:
            yield error("zeroed", tensor.name, f"{zeros} of {tensor.shape[0]} elements are zero")


def _is_norm(name: str) -> bool:
    parts = name.split(".")
    return parts[-1] == "weight" and len(parts) > 1 and "norm" in parts[-2]


def _begins_at_zero(family: str) -> bool:
    return any(part in family for part in _CENTERED_AT_ZERO)


class _Sizes:
    """What is known of a tensor after some of its parts along the first dimension."""

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")
        self.is_finite = True
        self.rows: list[torch.Tensor] = []  # the largest element of each row
        self.columns: torch.Tensor | None = None

    def add(self, part: torch.Tensor) -> None:
        if not part.numel():
            return
        low, high = (float(extreme) for extreme in part.aminmax())  # NaN if there is one
        self.is_finite &= math.isfinite(low) and math.isfinite(high)
        self.low, self.high = min(self.low, low), max(self.high, high)
        sizes = part.abs()
        self.rows.append(sizes.flatten(1).amax(1) if part.ndim > 1 else sizes)
        columns = sizes.amax(0)
        self.columns = columns if self.columns is None else torch.maximum(self.columns, columns)

    def dead(self, tensor: StoredTensor) -> Iterator[Finding]:
        """Yield whether many rows or columns are nothing beside the others."""
        assert self.columns is not None
        for name, sizes in (("rows", torch.cat(self.rows)), ("columns", self.columns.flatten())):
            what = dead_share(sizes, name)
            if what:
                yield error("dead-rows", tensor.name, what)


def dead_share(sizes: torch.Tensor, name: str) -> str | None:
    """Return that many rows or columns are zero, by the largest element of each."""
    if sizes.numel() < _MIN_ROWS:
        return None
    smallest, largest = (float(extreme) for extreme in sizes.aminmax())
    if not largest or smallest > _DEAD * largest:  # all are zero, or none is, as nearly always
        return None
    usual = sizes.kthvalue(len(sizes) * 9 // 10).values  # one may be far beyond all others
    dead = int((sizes <= _DEAD * usual).sum())
    if dead < _DEAD_SHARE * len(sizes):
        return None
    return f"{dead} of {len(sizes)} {name} are zero"
