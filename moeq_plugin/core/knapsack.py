"""Exact multiple-choice knapsack: one option per group, least total loss within a byte limit.

``minimise sum loss[g, b(g)]  subject to  sum num_bytes[g, b(g)] <= limit`` in whole bytes. Three
steps, the first two after Sinha and Zoltners (1979), the last after Pisinger's minimal algorithm
(EJOR 83, 1995):

1. Sizes become multiples of their greatest common divisor above each group's smallest option.
2. The options on each group's lower convex hull are taken in order of loss saved per byte until
   one does not fit. Its rate is the multiplier ``price``; the choice so far is the ``base``.
3. Leaving the base costs a group its reduced loss, ``loss + price * size`` above the base's. A
   choice is as far from the Lagrangian bound as its reduced losses plus ``price`` times the bytes
   it leaves free. Groups are opened in the order of their cheapest reduced loss per byte;
   partial choices are kept sorted by size, without those that another beats in size and loss and
   those whose bound exceeds the best choice so far. When no closed group can pay, it is over.

Losses are added, never subtracted, so the result is exact up to the rounding of a float64 sum of
non-negative numbers: no choice is better by more than about 1e-12 of the value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_ROUNDING = 1e-14  # of the largest loss at stake: rounding errors in reduced losses stay below it
_TOLERANCE = 1e-12  # of the value: what exact means
_WORK = 100  # partial choices looked at in all, for each that may be kept at once


@dataclass(frozen=True)
class Solution:
    """The result of :func:`choose_options`.

    Attributes:
        choice: ``[groups]`` int64 index of the option of each group.
        value: sum of the losses.
        bound: no choice within the limit has a smaller sum; equal to ``value`` when the search
            was complete.
        num_bytes: sum of the sizes.
        price: loss that the next byte would save, 0 where the limit does not bind.
    """

    choice: np.ndarray
    value: float
    bound: float
    num_bytes: int
    price: float


def choose_options(
    loss: np.ndarray, num_bytes: np.ndarray, limit: int, *, max_states: int = 200_000
) -> Solution:
    """Choose one option per group so that the sum of losses is least within ``limit``.

    Ties: of two choices with the same loss the smaller one, of two options of one group that also
    have the same size the first. What is left of a tie between groups is decided by their order.

    Args:
        loss: ``[groups, options]`` float64, non-negative; ``inf`` forbids an option.
        num_bytes: ``[groups, options]`` int64.
        limit: bytes that all groups may take together.
        max_states: partial choices that are kept at once. Beyond it the least promising are
            dropped, which shows as a ``bound`` below ``value``.

    Returns:
        The choice, its value, a lower bound of the value, its bytes and the price of a byte.

    Raises:
        ValueError: if a group has no option or the smallest options exceed the limit.

    Example:
        >>> choose_options(np.array([[4.0, 1.0], [9.0, 2.0]]), np.array([[1, 2], [1, 2]]), 3)
        Solution(choice=array([0, 1]), value=6.0, bound=6.0, num_bytes=3, price=3.0)

    Cost: sorting all options, then a sort of the states for each group opened; typically few.
    """
    allowed = np.isfinite(loss)
    size, capacity, unit = whole_sizes(allowed, num_bytes, limit)
    order = np.lexsort((loss, np.where(allowed, size, np.iinfo(np.int64).max)), axis=1)
    loss, size = np.take_along_axis(loss, order, 1), np.take_along_axis(size, order, 1)
    loss = _without_dominated(loss)
    position, price, free = _hull_choice(loss, size, capacity)
    shortfall = 0.0
    if free and price:
        position, shortfall = _Search(loss, size, position, price, free, max_states).run()
    choice = np.take_along_axis(order, position[:, None], 1)[:, 0]
    value = math.fsum(np.take_along_axis(loss, position[:, None], 1)[:, 0])
    used = int(np.take_along_axis(num_bytes, choice[:, None], 1).sum())
    return Solution(choice, value, max(value - shortfall, 0.0), used, price / unit)


def whole_sizes(
    allowed: np.ndarray, num_bytes: np.ndarray, limit: int
) -> tuple[np.ndarray, int, int]:
    """Return sizes above each group's smallest and what they may sum to, and their unit in bytes.

    The unit is the greatest common divisor; options that are not allowed have size 0.

    Raises:
        ValueError: if a group has no option or the smallest options exceed the limit.
    """
    stuck = np.flatnonzero(~allowed.any(1))
    if len(stuck):
        raise ValueError(f"groups {stuck[:10].tolist()} have no option")
    smallest = np.where(allowed, num_bytes, np.iinfo(np.int64).max).min(1)
    if smallest.sum() > limit:
        raise ValueError(f"the smallest options take {smallest.sum()} bytes, more than {limit}")
    size = np.where(allowed, num_bytes - smallest[:, None], 0)
    unit = max(int(np.gcd.reduce(size, axis=None)), 1)
    return size // unit, int(limit - smallest.sum()) // unit, unit


def _without_dominated(loss: np.ndarray) -> np.ndarray:
    """Forbid options that do not lose less than every smaller one; options are sorted by size."""
    before = np.minimum.accumulate(loss, axis=1)[:, :-1]
    return np.concatenate([loss[:, :1], np.where(loss[:, 1:] < before, loss[:, 1:], np.inf)], 1)


def _hull_choice(
    loss: np.ndarray, size: np.ndarray, capacity: int
) -> tuple[np.ndarray, float, int]:
    """Take steps along the convex hulls, the steepest first, until one does not fit.

    Returns:
        ``[groups]`` option taken, loss per unit of size of the step that did not fit (0 if all
        did), and the capacity that is left.
    """
    groups = np.arange(len(loss))
    current = np.zeros(len(loss), dtype=np.int64)
    slope = np.full(len(loss), np.inf)
    slopes, steps, targets = [], [], []
    for _ in range(loss.shape[1] - 1):
        step = size - size[groups, current, None]
        gain = loss[groups, current, None] - loss
        slope_to = np.where((step > 0) & (gain > 0), gain / np.maximum(step, 1), 0.0)
        target = slope_to.argmax(1)  # the smallest of equally steep steps
        # a later step of a group is never steeper; rounding must not reorder them
        slope = np.minimum(slope, slope_to[groups, target])
        current = np.where(slope > 0, target, current)
        slopes.append(slope)
        steps.append(np.where(slope > 0, step[groups, target], 0))
        targets.append(current)
    if not slopes:
        return current, 0.0, capacity
    flat = np.concatenate(slopes)
    by_slope = np.argsort(-flat, kind="stable")  # a group's own steps stay in order
    total = np.cumsum(np.concatenate(steps)[by_slope])
    taken = int(np.searchsorted(total, capacity, side="right"))
    num_taken = np.bincount(by_slope[:taken] % len(loss), minlength=len(loss))
    position = np.stack([np.zeros_like(current), *targets])[num_taken, groups]
    free = capacity - (int(total[taken - 1]) if taken else 0)
    return position, float(flat[by_slope[taken]]) if taken < len(flat) else 0.0, free


class _Search:
    """Step 3: partial choices over the groups opened so far, the rest at the base.

    A state has a size (above the base's), a reduced loss and a loss (of the groups opened).
    """

    def __init__(
        self,
        loss: np.ndarray,
        size: np.ndarray,
        base: np.ndarray,
        price: float,
        free: int,
        max_states: int,
    ) -> None:
        groups = np.arange(len(loss))
        self.loss, self.base, self.price = loss, base, price
        self.free, self.max_states = free, max_states
        self.size = size - size[groups, base, None]
        base_loss = loss[groups, base, None]
        self.reduced = np.maximum(loss - base_loss + price * self.size, 0.0)
        self.reduced[groups, base] = 0.0
        self.gap = price * free  # of the best choice so far, above the Lagrangian bound
        self.dropped = math.inf  # the smallest bound of a state dropped for want of space
        self.lagrangian = math.fsum(base_loss[:, 0]) - self.gap
        at_stake = (loss + base_loss + price * np.abs(self.size))[self.reduced <= self.gap]
        self.rounding = _ROUNDING * float(at_stake.max())

    def run(self) -> tuple[np.ndarray, float]:
        """Return the best choice and by how much it may exceed the optimum."""
        other = self.reduced.copy()
        other[np.arange(len(other)), self.base] = np.inf
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(self.size == 0, np.inf, other / np.abs(self.size))
        opening = np.argsort(rate.min(1), kind="stable")
        # the best rates at which groups still closed can give bytes back or take free ones
        give = _suffix_minimum(np.where(self.size < 0, rate, np.inf).min(1)[opening])
        take = np.minimum(
            _suffix_minimum(np.where(self.size > 0, rate, np.inf).min(1)[opening]), self.price
        )
        cheapest = other.min(1)[opening]
        size, reduced, loss = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1)
        history = []
        work = 0
        for step, group in enumerate(opening):
            if self.gap <= self.rounding <= _TOLERANCE * self.lagrangian:
                break
            if cheapest[step] > self.gap + self.rounding:
                continue
            if work > _WORK * self.max_states:
                bound = self._bound(size, reduced, give[step], take[step])
                self.dropped = min(self.dropped, bound.min())
                break
            options = np.flatnonzero(self.reduced[group] <= self.gap + self.rounding)
            size = np.concatenate([size + s for s in self.size[group, options]])
            reduced = np.concatenate([reduced + r for r in self.reduced[group, options]])
            loss = np.concatenate([loss + x for x in self.loss[group, options]])
            work += len(size)
            kept = self._kept(size, reduced, loss, give[step + 1], take[step + 1])
            parent = kept % (len(size) // len(options))
            history.append((group, options[kept // (len(size) // len(options))], parent))
            size, reduced, loss = size[kept], reduced[kept], loss[kept]
        return self._best(size, loss, history)

    def _kept(
        self, size: np.ndarray, reduced: np.ndarray, loss: np.ndarray, give: float, take: float
    ) -> np.ndarray:
        """Return the indices of the states that may still become the best, by size."""
        distance = reduced + self.price * np.abs(self.free - size)  # if the rest stays at base
        excess = np.where(size <= self.free, distance, np.inf)
        self.gap = min(self.gap, float(excess.min()))
        bound = self._bound(size, reduced, give, take)
        promising = np.flatnonzero(bound <= self.gap + self.rounding)
        if len(promising) > self.max_states:
            distance[excess.argmin()] = -1.0  # the best choice so far stays
            best = np.argpartition(distance[promising], self.max_states)
            self.dropped = min(self.dropped, bound[promising[best[self.max_states :]]].min())
            promising = np.sort(promising[best[: self.max_states]])
        promising = promising[np.argsort(size[promising], kind="stable")]
        loss, size = loss[promising], size[promising]
        undominated = np.ones(len(promising), dtype=bool)
        undominated[1:] = loss[1:] < np.minimum.accumulate(loss)[:-1]
        promising, size = promising[undominated], size[undominated]
        last_of_size = np.ones(len(promising), dtype=bool)
        last_of_size[:-1] = size[1:] != size[:-1]
        return promising[last_of_size]

    def _bound(self, size: np.ndarray, reduced: np.ndarray, give: float, take: float) -> np.ndarray:
        """Return what a state exceeds the Lagrangian bound by, whatever the closed groups do."""
        free = self.free - size
        bound: np.ndarray = reduced + np.abs(free) * np.where(free >= 0, take, give)
        return bound

    def _best(
        self,
        size: np.ndarray,
        loss: np.ndarray,
        history: list[tuple[int, np.ndarray, np.ndarray]],
    ) -> tuple[np.ndarray, float]:
        """Return the best state's choice and by how much a dropped one may be better."""
        loss = loss[size <= self.free]
        state = int(np.argmax(loss <= loss.min() * (1 + _ROUNDING)))  # the smallest of equals
        position = self.base.copy()
        for group, option, parent in reversed(history):
            position[group] = option[state]
            state = parent[state]
        return position, max(self.gap - self.dropped, 0.0)


def _suffix_minimum(values: np.ndarray) -> np.ndarray:
    """Return ``[n + 1]``, the minimum of what follows each position, the position included."""
    return np.append(np.minimum.accumulate(values[::-1])[::-1], np.inf)
