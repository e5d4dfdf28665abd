"""Is a weight there twice: an expert under two numbers, a projection or a whole layer again?"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator

from moeq_plugin.checkpoint.architecture import Linear, Role
from moeq_plugin.checkpoint.checks.findings import Finding, error, warning
from moeq_plugin.checkpoint.headers import StoredTensor, read_bytes
from moeq_plugin.checkpoint.layout import Layout

_CODES = ("weight_packed", "qweight", "weight")
_MIN_BYTES = 64  # fewer may be equal by chance
_LAYER = 3  # equal linears that make a layer a copy


def check_copies(layout: Layout) -> Iterator[Finding]:
    """Yield weights that have the same numbers as another one.

    One expert twice in a layer is a warning, since pruned and merged models have them; a family
    that we know shares no other weights.
    """
    seen: dict[tuple[tuple[int, ...], bytes], tuple[Linear, StoredTensor]] = {}
    layers: Counter[tuple[int, int]] = Counter()
    for linear in layout.present():
        stored = _codes(layout, linear)
        if stored is None or linear.is_mtp:
            continue
        key = (stored.shape, hashlib.sha256(read_bytes(stored)).digest())
        first, other = seen.setdefault(key, (linear, stored))
        if first is linear:
            continue
        if first.layer is not None and linear.layer is not None and first.layer != linear.layer:
            layers[first.layer, linear.layer] += 1
        what = f"the same numbers as {other.name}"
        if linear.role is Role.EXPERT and _is_twin(linear, first):
            yield warning("duplicate-expert", stored.name, what)
        elif layout.architecture.is_known:
            yield error("duplicate-weight", stored.name, what)
        else:
            yield warning("duplicate-weight", stored.name, what)
    for (one, again), count in layers.items():
        if count >= _LAYER:
            what = f"{count} of its linears have the same numbers as those of layer {one}"
            yield error("duplicate-layer", f"model.layers.{again}", what)


def _codes(layout: Layout, linear: Linear) -> StoredTensor | None:
    found = layout.modules[linear.name]
    stored = next((found[suffix] for suffix in _CODES if suffix in found), None)
    scheme = layout.stored[linear.name]
    if scheme is not None and scheme.num_bits == 1:  # no reader takes them, alike or not
        return None
    if stored is None or not stored.is_whole or stored.num_bytes < _MIN_BYTES:
        return None
    return stored


def _is_twin(one: Linear, other: Linear) -> bool:
    """Tell whether two linears are the same projection of two experts of a layer."""
    same = one.name.rpartition(".")[2] == other.name.rpartition(".")[2]
    return same and one.layer == other.layer
