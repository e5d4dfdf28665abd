"""Which option every linear gets: the least total loss within a budget of real bytes.

Losses of a table add up, so this is a multiple-choice knapsack, solved exactly by
:mod:`moeq_plugin.core.knapsack`. What must share an option is one group of it: a target's
``units`` say so, because a server that fuses a layer's experts reads one scheme for all of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from moeq_plugin.core.allocation_reasons import reasons_for
from moeq_plugin.core.knapsack import Solution, choose_options
from moeq_plugin.core.minimax_knapsack import minimize_worst_ratio
from moeq_plugin.core.sensitivity import SensitivityTable
from moeq_plugin.untrusted.broken import BROKEN, sentence
from moeq_plugin.untrusted.reading import MAX_LIST_BYTES, read_json

SCHEMA_VERSION = 1


class InfeasibleBudgetError(ValueError):
    """The smallest options of a table exceed the budget."""


@dataclass(frozen=True)
class BitBudget:
    """How large the result may be; exactly one of the two is given.

    A limit is the largest whole number of bytes that still reads as the number given: the bits
    per weight that a report prints, handed back as a budget, give the same bytes again.

    Attributes:
        bits_per_weight: of all tensors stored for the table's rows (packed weights, scales and
            zero points), per weight.
        size_gb: of all tensors of the checkpoint, in 1e9 bytes.
    """

    bits_per_weight: float | None = None
    size_gb: float | None = None

    def __post_init__(self) -> None:
        given = [x for x in (self.bits_per_weight, self.size_gb) if x is not None]
        if len(given) != 1:
            raise ValueError(
                "give exactly one of bits_per_weight and size_gb, "
                f"got {self.bits_per_weight} and {self.size_gb}"
            )
        if not 0 < given[0] < math.inf:
            raise ValueError(f"a budget must be positive and finite, got {given[0]}")

    def limit_bytes(self, table: SensitivityTable) -> int:
        """Return the bytes that the table's rows may take, which may be negative for a size."""
        if self.bits_per_weight is not None:
            weights = int(table.num_weights.sum())
            return math.floor(_largest_that_reads_as(self.bits_per_weight) * weights / 8)
        assert self.size_gb is not None
        return math.floor(_largest_that_reads_as(self.size_gb) * 10**9) - table.fixed_bytes


@dataclass(frozen=True)
class Allocation:
    """The result of :func:`allocate_bits`.

    Attributes:
        target: whose units got one option each.
        budget: as asked.
        robust: whether the worst ratio over domains was minimised instead of the mean loss.
        limit_bytes: the budget in bytes of the table's rows.
        num_bytes: what the rows take; never above the limit.
        bits_per_weight: the same per weight.
        value: the objective. Nats per token, the mean over domains; if robust, the largest ratio
            of a domain's loss to its reference.
        bound: no choice within the limit has a smaller value; see :attr:`gap`.
        price: nats per token that the next byte would save; 0 where the budget does not bind,
            ``None`` if robust.
        losses: domain to loss, in nats per token.
        choice: row to option.
        reasons: unit to a sentence that says why it got what it got.
    """

    target: str
    budget: BitBudget
    robust: bool
    limit_bytes: int
    num_bytes: int
    bits_per_weight: float
    value: float
    bound: float
    price: float | None
    losses: Mapping[str, float]
    choice: Mapping[str, str]
    reasons: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.num_bytes > self.limit_bytes:
            raise ValueError(f"{self.num_bytes} bytes exceed the limit of {self.limit_bytes}")
        if not 0 <= self.bound <= self.value < math.inf:
            raise ValueError(f"expected 0 <= bound <= value, got {self.bound} and {self.value}")

    @property
    def gap(self) -> float:
        """Return ``(value - bound) / value``, 0 where the choice is certified to be optimal."""
        return (self.value - self.bound) / self.value if self.value else 0.0

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        Path(path).write_text(json.dumps(content, allow_nan=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Allocation:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is not such an allocation.
        """
        try:
            content: dict[str, Any] = read_json(Path(path), MAX_LIST_BYTES)
            version = content.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise ValueError(f"schema version {ascii(version)}, expected {SCHEMA_VERSION}")
            content["budget"] = BitBudget(**content["budget"])
            return cls(**content)
        except BROKEN as error:
            raise ValueError(f"{path} is not an allocation: {sentence(error)}") from error


@dataclass(frozen=True)
class _Units:
    """A table with the rows of each unit added up.

    Attributes:
        labels: names of the units.
        of_row: ``[rows]`` index of each row's unit.
        loss: ``[domains, units, options]``.
        num_bytes: ``[units, options]``.
    """

    labels: tuple[str, ...]
    of_row: np.ndarray
    loss: np.ndarray
    num_bytes: np.ndarray


def allocate_bits(
    table: SensitivityTable, budget: BitBudget, *, target: str = "vllm", robust: bool = False
) -> Allocation:
    """Give every row the option that makes the total loss least within the budget.

    Rows of one unit get one option, which all of them must allow. With several domains the
    objective is the mean of their losses. ``robust`` minimises ``t`` such that every domain's
    loss is at most ``t`` times its reference instead: the loss of the best option that, given to
    all units, fits the budget; of the optimal choice for the mean where no such option fits.

    Args:
        table: loss and bytes of every row at every option.
        budget: bits per weight or size of the checkpoint.
        target: a key of the table's ``units``.
        robust: minimise the worst ratio over domains instead of the mean loss.

    Returns:
        The choice with its certificate. Without ``robust`` the gap is 0 but for rounding unless
        the search ran out of space; with it, see :func:`~.minimax_knapsack.minimize_worst_ratio`.

    Raises:
        InfeasibleBudgetError: if even the smallest options exceed the budget.
        ValueError: if the target is unknown, a unit has no option that all its rows allow, or
            ``robust`` has a reference that loses nothing.
    """
    return _allocate(table, _units_of(table, target), budget, target, robust)


def pareto_front(
    table: SensitivityTable,
    budgets: Iterable[BitBudget],
    *,
    target: str = "vllm",
    robust: bool = False,
) -> list[Allocation]:
    """Return :func:`allocate_bits` for each budget, in their order."""
    units = _units_of(table, target)
    return [_allocate(table, units, budget, target, robust) for budget in budgets]


def achievable_bytes(table: SensitivityTable, *, target: str = "vllm") -> tuple[int, int]:
    """Return the bytes of the table's rows with the smallest and the largest options allowed."""
    return _range_of(_units_of(table, target))


def _allocate(
    table: SensitivityTable, units: _Units, budget: BitBudget, target: str, robust: bool
) -> Allocation:
    limit = budget.limit_bytes(table)
    smallest, largest = _range_of(units)
    if limit < smallest:
        raise InfeasibleBudgetError(_infeasible(table, budget, target, smallest, largest))
    solution = choose_options(units.loss.mean(0), units.num_bytes, limit)
    price: float | None = solution.price
    if robust:
        reference = _reference(units, limit, solution)
        if not reference.all():
            lossless = [d for d, x in zip(table.domains, reference, strict=True) if not x]
            raise ValueError(
                f"the reference loses nothing in {lossless}, so there is no ratio to minimise; "
                "allocate without robust"
            )
        ratio = units.loss / reference[:, None, None]
        solution, price = minimize_worst_ratio(ratio, units.num_bytes, limit), None
    chosen = np.arange(len(units.labels)), solution.choice
    losses = [math.fsum(loss[chosen]) for loss in units.loss]
    mean = units.loss.mean(0)
    sentences = reasons_for(table.options, mean, units.num_bytes, solution.choice, price)
    return Allocation(
        target=target,
        budget=budget,
        robust=robust,
        limit_bytes=limit,
        num_bytes=solution.num_bytes,
        bits_per_weight=8 * solution.num_bytes / int(table.num_weights.sum()),
        value=solution.value,
        bound=solution.bound,
        price=price,
        losses=dict(zip(table.domains, losses, strict=True)),
        choice={
            row: table.options[solution.choice[unit]]
            for row, unit in zip(table.rows, units.of_row, strict=True)
        },
        reasons=dict(zip(units.labels, sentences, strict=True)),
    )


def _units_of(table: SensitivityTable, target: str) -> _Units:
    if target not in table.units:
        raise ValueError(f"the table has units for {sorted(table.units)}, not for {str(target)!r}")
    labels = tuple(dict.fromkeys(table.units[target]))
    index = {label: i for i, label in enumerate(labels)}
    of_row = np.array([index[label] for label in table.units[target]])
    loss = np.zeros((len(table.domains), len(labels), len(table.options)))
    for unit_loss, row_loss in zip(loss, table.loss, strict=True):
        np.add.at(unit_loss, of_row, row_loss)
    num_bytes = np.zeros(loss.shape[1:], dtype=np.int64)
    np.add.at(num_bytes, of_row, table.num_bytes)
    allowed = np.all(np.isfinite(loss), axis=0)
    stuck = np.flatnonzero(~allowed.any(1))
    if len(stuck):
        raise ValueError(
            f"no option is allowed for all rows of {[labels[i] for i in stuck[:10]]}; "
            "add one to the table or give these rows other units"
        )
    return _Units(labels, of_row, loss, num_bytes)


def _range_of(units: _Units) -> tuple[int, int]:
    allowed = np.isfinite(units.loss).all(0)
    smallest = np.where(allowed, units.num_bytes, np.iinfo(np.int64).max).min(1)
    largest = np.where(allowed, units.num_bytes, -1).max(1)
    return int(smallest.sum()), int(largest.sum())


def _infeasible(
    table: SensitivityTable, budget: BitBudget, target: str, smallest: int, largest: int
) -> str:
    """Return the message, in the unit of the budget; both ends are rounded up, hence feasible."""
    if budget.bits_per_weight is not None:
        weights = int(table.num_weights.sum())
        low, high = (-(-8 * end * 10**6 // weights) / 10**6 for end in (smallest, largest))
        asked, unit = f"{budget.bits_per_weight:g}", "bits per weight"
    else:
        low, high = ((end + table.fixed_bytes) / 1e9 for end in (smallest, largest))
        asked = f"{budget.size_gb:g}"
        unit = f"GB, of which {table.fixed_bytes / 1e9} GB are not quantized"
    return (
        f"a budget of {asked} is too small: for target {str(target)!r} the options reach from "
        f"{low} to {high} {unit}; raise the budget or add a smaller option"
    )


def _reference(units: _Units, limit: int, optimum: Solution) -> np.ndarray:
    """Return ``[domains]``, what robust allocation measures each domain's loss against."""
    is_uniform = np.isfinite(units.loss).all((0, 1)) & (units.num_bytes.sum(0) <= limit)
    if is_uniform.any():
        best: np.ndarray = units.loss[:, :, is_uniform].sum(1).min(1)
        return best
    return np.array([loss[np.arange(len(loss)), optimum.choice].sum() for loss in units.loss])


def _largest_that_reads_as(number: float) -> Fraction:
    """Return the largest real number that float64 rounds to ``number``."""
    return Fraction(number) + Fraction(math.ulp(number)) / 2
