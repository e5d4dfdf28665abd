"""Can a server split every weight over its ranks of tensor parallelism?

vLLM splits q, k, v, gate and up by rows and o and down by columns; groups of columns that share a
scale, and words of packed codes, must not straddle a boundary.
"""

from __future__ import annotations

from collections.abc import Iterator

from moeq_plugin.checkpoint.architecture import Architecture, Linear, Role
from moeq_plugin.checkpoint.checks.findings import Finding, error
from moeq_plugin.checkpoint.schemes import GPTQ_FORMS, Scheme
from moeq_plugin.core.names import role_of

_BY_COLUMNS = ("o_proj", "down_proj")
_WHOLE = ("q_a_proj", "kv_a_proj_with_mqa", "eh_proj")


def check_parallel(
    architecture: Architecture, stored: dict[str, Scheme | None], tp: int
) -> Iterator[Finding]:
    """Yield what does not divide.

    Args:
        architecture: the model.
        stored: the scheme of each linear.
        tp: number of ranks.
    """
    if architecture.heads and tp > 1:
        heads, kv_heads = architecture.heads
        if heads % tp or (kv_heads % tp and tp % kv_heads):
            what = f"{heads} query and {kv_heads} key heads cannot be split over {tp} ranks"
            yield error("tp-indivisible", "attention", what)
    seen = set()
    for name, scheme in stored.items():
        linear = architecture.linears[name]
        reason = why_indivisible(linear, scheme, tp)
        where = role_of(name)
        if reason and (where, reason) not in seen:
            seen.add((where, reason))
            yield error("tp-indivisible", where, reason)


def why_indivisible(linear: Linear, scheme: Scheme | None, tp: int) -> str | None:
    """Return why ``tp`` ranks cannot share a weight, ``None`` if they can."""
    projection = linear.name.rpartition(".")[2]
    rows, columns = linear.shape
    if linear.role in {Role.ROUTER, Role.SHARED_GATE, Role.HEAD} or projection in _WHOLE:
        tp = 1  # every rank holds the whole matrix, or pads it
    if projection in _BY_COLUMNS:
        if columns % tp:
            return f"{columns} columns over {tp} ranks"
        columns //= tp
    elif rows % tp:
        return f"{rows} rows over {tp} ranks"
    else:
        rows //= tp
    ranks = f"{tp} ranks with " if tp > 1 else ""
    if scheme is None or scheme.is_float:
        return None
    if scheme.group_size and columns % scheme.group_size:
        return f"groups of {scheme.group_size} do not divide {ranks}{columns} columns"
    if scheme.form in {*GPTQ_FORMS, "pack-quantized"} and tp > 1:
        if columns * scheme.num_bits % 32:
            return f"{ranks}{columns} columns of {scheme.num_bits} bits fill no whole words"
        if not scheme.symmetric and rows * scheme.num_bits % 32:
            return f"{ranks}{rows} zero points of {scheme.num_bits} bits fill no whole words"
    return None
