"""Can a router choose every expert? It cannot where rows are zero, equal or beyond all others."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moeq_plugin.checkpoint.architecture import Role
from moeq_plugin.checkpoint.checks.findings import Finding, error
from moeq_plugin.checkpoint.checks.values.readable import is_readable
from moeq_plugin.checkpoint.codes import read_tensor
from moeq_plugin.checkpoint.layout import Layout

_RANGE = 1e3  # of lengths, beside the median row


def check_routers(layout: Layout) -> Iterator[Finding]:
    """Yield what is wrong with the rows of each router."""
    for linear in layout.present(Role.ROUTER):
        if layout.stored[linear.name] is not None or not is_readable(layout, linear):
            continue
        tensor = layout.modules[linear.name]["weight"]
        rows = read_tensor(tensor).float()
        if len(rows) < 2 or not bool(rows.isfinite().all()):
            continue
        what = _odd_rows(rows)
        if what:
            yield error("router-rows", tensor.name, what)


def _odd_rows(rows: torch.Tensor) -> str | None:
    lengths = rows.norm(dim=1)
    if not bool(lengths.any()):
        return None  # said to be zero as a whole
    zero = (lengths == 0).nonzero().flatten().tolist()
    if zero:
        return f"{_listed(zero)} zero: the expert's score does not depend on the token"
    _, which, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
    equal = (counts[which] > 1).nonzero().flatten().tolist()
    if equal:
        return f"{_listed(equal)} equal: two experts get the same tokens"
    usual = lengths.median()
    far = ((lengths > _RANGE * usual) | (lengths < usual / _RANGE)).nonzero().flatten().tolist()
    return f"{_listed(far)} of another size than all others" if far else None


def _listed(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    return f"row {shown} is" if len(rows) == 1 else f"rows {shown} are"
