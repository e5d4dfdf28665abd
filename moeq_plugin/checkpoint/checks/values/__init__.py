"""Are the numbers sane: finite, not all alike, scales positive, codes not at their limits?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moeq_plugin.checkpoint.architecture import Linear, Role
from moeq_plugin.checkpoint.checks.findings import Finding, error, warning
from moeq_plugin.checkpoint.checks.values.readable import is_readable
from moeq_plugin.checkpoint.codes import blocks, can_read, pieces, read_tensor
from moeq_plugin.checkpoint.formats import FLOATS, num_groups
from moeq_plugin.checkpoint.headers import StoredTensor, read_bytes
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.checkpoint.reader_names import in_file
from moeq_plugin.checkpoint.schemes import Scheme

# min-max rounding puts 1 of 16 codes at a limit; with few bits the limits are where most codes are
_SATURATED = {2: 0.95, 3: 0.8}
_OUTLIER = 1e4  # times the median scale of the weight
_SCALES = ("weight_scale", "scales")


def check_values(layout: Layout) -> Iterator[Finding]:
    """Yield what is wrong with numbers; reads the whole checkpoint, one tensor at a time."""
    for tensor in layout.checkpoint.tensors.values():
        if tensor.dtype in {*FLOATS, "F64"} and can_read(tensor):
            yield from _check_floats(tensor)
    for linear in layout.present():
        scheme = layout.stored[linear.name]
        if scheme and not scheme.is_float and is_readable(layout, linear):
            yield from _check_codes(layout, linear, scheme)
    yield from _duplicate_experts(layout)


@dataclass
class _Extremes:
    """What is known of a tensor after some of its parts."""

    low: float = float("inf")
    high: float = float("-inf")
    is_finite: bool = True

    def add(self, part: torch.Tensor) -> None:
        if part.numel():
            self.is_finite &= bool(part.isfinite().all())
            self.low = min(self.low, float(part.min()))
            self.high = max(self.high, float(part.max()))


def _check_floats(tensor: StoredTensor) -> Iterator[Finding]:
    extremes = _Extremes()
    for part in pieces(tensor):
        extremes.add(part)
    if not extremes.is_finite:
        yield error("non-finite", tensor.name, "NaN or infinity")
        return
    suffix = tensor.name.rpartition(".")[2]
    if suffix in _SCALES and extremes.low <= 0:
        yield error("scale-not-positive", tensor.name, f"smallest scale {extremes.low:.4g}")
    elif suffix in _SCALES and len(tensor.shape) == 2:
        median = float(read_tensor(tensor).float().median())
        if extremes.high > _OUTLIER * median > 0:
            what = f"largest {extremes.high:.4g}, median {median:.4g}"
            yield warning("scale-outlier", tensor.name, what)
    elif len(tensor.shape) >= 2 and suffix not in _SCALES and extremes.low == extremes.high:
        check = "zeroed" if extremes.low == 0 else "constant"
        yield error(check, tensor.name, f"every element is {extremes.low:.4g}")


def _check_codes(layout: Layout, linear: Linear, scheme: Scheme) -> Iterator[Finding]:
    found = layout.modules[linear.name]
    where = in_file(linear.name, layout.architecture.family)
    if "weight_shape" in found:
        stated = read_tensor(found["weight_shape"]).tolist()
        if stated != list(linear.shape):
            name = found["weight_shape"].name
            yield error("wrong-shape", name, f"says {stated}, expected {list(linear.shape)}")
    if "g_idx" in found:
        groups = read_tensor(found["g_idx"])
        count = num_groups(scheme, linear.shape[1])
        if int(groups.min()) < 0 or int(groups.max()) >= count:
            yield error("group-index", found["g_idx"].name, f"entries outside of 0 to {count - 1}")
    highest = (1 << scheme.num_bits) - 1
    extremes, at_limit, nonzero = _Extremes(), 0, False
    for block in blocks(found, scheme, linear.shape):
        extremes.add(block.codes)
        at_limit += int(((block.codes == 0) | (block.codes == highest)).sum())
        nonzero |= bool((block.codes != block.zero_point[:, block.group]).any())
    share = at_limit / (linear.shape[0] * linear.shape[1])
    if not nonzero:
        yield error("zeroed", where, "every code is the zero point: the weight is 0")
    elif extremes.low == extremes.high:
        yield error("constant", where, f"every code is {extremes.low:.0f}")
    elif share > _SATURATED.get(scheme.num_bits, 0.5) and scheme.num_bits > 1:
        yield error("saturated", where, f"{share:.0%} of the codes are the lowest or the highest")


def _duplicate_experts(layout: Layout) -> Iterator[Finding]:
    seen: dict[tuple[int | None, str, bytes], str] = {}
    for linear in layout.present(Role.EXPERT):
        found = layout.modules[linear.name]
        packed = found.get("weight_packed") or found.get("qweight") or found.get("weight")
        if packed is None or not packed.is_whole:
            continue
        projection = linear.name.rpartition(".")[2]
        key = (linear.layer, projection, hashlib.sha256(read_bytes(packed)).digest())
        if key in seen:
            yield warning("duplicate-expert", packed.name, f"the same numbers as {seen[key]}")
        seen.setdefault(key, packed.name)
