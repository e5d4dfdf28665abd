"""Linears without enough tokens of their own, one row for those of an expert that agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moeq_plugin.core.names import place
from moeq_plugin.records.run import Basis, LinearRecord
from moeq_plugin.report.section import number


@dataclass(frozen=True)
class StarvedRow:
    """One or several linears that rest on the same.

    Attributes:
        name: of the linear; ``EXPERT.*`` where all linears of an expert stand in this row.
        basis: what they rest on.
        effective_tokens: of each.
    """

    name: str
    basis: Basis
    effective_tokens: float


def starved_rows(linears: Sequence[LinearRecord]) -> list[StarvedRow]:
    """Return the rows in the order of the linears.

    Args:
        linears: of a run, all of them: those that rest on enough tokens have no row.
    """
    groups: dict[str, list[LinearRecord]] = {}
    for linear in linears:
        groups.setdefault(_expert_of(linear.name) or linear.name, []).append(linear)
    rows: list[StarvedRow] = []
    for name, group in groups.items():
        # as they are shown: one token more or less of thousands is no row of its own
        shown = {(linear.basis, number(linear.effective_tokens)) for linear in group}
        if len(group) > 1 and len(shown) == 1:
            group = [replace(group[0], name=f"{name}.*")]
        rows += [
            StarvedRow(x.name, x.basis, x.effective_tokens)
            for x in group
            if x.basis is not Basis.OWN
        ]
    return rows


def _expert_of(name: str) -> str:
    """Return the module of the expert that a linear belongs to, empty for what is in none."""
    return name.rpartition(".")[0] if place(name).expert is not None else ""
