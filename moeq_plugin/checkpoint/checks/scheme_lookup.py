"""Does each reader find for every weight the scheme that it is stored in?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moeq_plugin.checkpoint.architecture import Linear, Role
from moeq_plugin.checkpoint.checks.findings import Finding, error, warning
from moeq_plugin.checkpoint.formats import is_same
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.checkpoint.lookup import ConflictError
from moeq_plugin.checkpoint.reader_names import in_file
from moeq_plugin.checkpoint.schemes import Scheme, describe
from moeq_plugin.core.names import pool_of


def check_lookups(layout: Layout, target: str) -> Iterator[Finding]:
    """Yield where a reader would read a weight in another scheme than it is stored in.

    Args:
        layout: the checkpoint.
        target: the reader whose misreading is an error; for the others it is a warning.
    """
    vllm, others = (error, warning) if target == "vllm" else (warning, error)
    linears = [linear for linear in layout.present() if linear.role is not Role.ROUTER]
    by_name = [linear for linear in linears if not linear.is_mtp]
    yield from _compare(layout, by_name, layout.declared, "compressed-tensors", others)
    if layout.schemes.dialect != "gptq":
        yield from _compare(layout, layout.present(), layout.lookup.in_vllm, "vLLM", vllm)
    else:  # vLLM finds 16-bit linears of this dialect by the dtypes in the file
        quantized = [linear for linear in linears if layout.stored[linear.name]]
        yield from _compare(layout, quantized, layout.lookup.in_vllm, "vLLM", vllm)


def _compare(
    layout: Layout,
    linears: list[Linear],
    lookup: Callable[[Linear], Scheme | None],
    reader: str,
    severe: Callable[[str, str, str], Finding],
) -> Iterator[Finding]:
    """Yield one finding for all experts of a layer that are misread alike."""
    alike: dict[tuple[str, str, str], list[Linear]] = {}
    conflicts = set()
    for linear in linears:
        stored = layout.stored[linear.name]
        try:
            found = lookup(linear)
        except ConflictError as cause:
            conflicts.add(str(cause))
            continue
        if found and stored and "unknown" in {found.form, stored.form}:
            continue
        if not is_same(found, stored, linear.shape[1]):
            what = f"stored as {describe(stored)}, {reader} reads {describe(found)}"
            key = (_check_id(linear, stored), pool_of(linear.name), what)
            alike.setdefault(key, []).append(linear)
    for conflict in sorted(conflicts):
        yield severe("mixed-fused-group", reader, conflict)
    for (check, pool, what), members in alike.items():
        many = f" ({len(members)} linears)" if len(members) > 1 else ""
        where = pool if len(members) > 1 else in_file(members[0].name, layout.architecture.family)
        severity = error if check == "lm-head-not-ignored" else severe
        yield severity(check, where, f"{what}{many}")


def _check_id(linear: Linear, stored: Scheme | None) -> str:
    if stored is None and linear.role is Role.HEAD:
        return "lm-head-not-ignored"
    if stored is None and linear.role is Role.ROUTER:
        return "router-not-ignored"
    if stored is None and linear.is_mtp:
        return "mtp-not-ignored"
    return "scheme-mismatch"
