"""In how many ways a pattern can fit a name at most: what backtracking has to try."""

from __future__ import annotations

import math
from re import _constants as ops  # type: ignore[attr-defined] # as in patterns.py
from typing import Any

TOO_MANY = 1 << 64  # no numbers of thousands of digits
_FEW = 8
_REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT)


def most_ways(tree: Any, length: int) -> int:
    """Return a number that backtracking over a name of that length cannot exceed.

    It is the number of ways in which the parts of the pattern can share the name among them.
    """
    items = list(tree)
    if items and items[-1][0] in _REPEATS and _ways(list(items[-1][1][2]), length) == 1:
        items.pop()  # whatever it takes, nothing follows that could make it take less
    return _ways(items, length)


def _ways(items: list[tuple[Any, Any]], length: int) -> int:
    ways, free = 1, 0
    for op, value in items:
        if op in _REPEATS:
            low, high, body = value
            is_simple = _ways(list(body), length) == 1 and body.getwidth()[0] > 0
            if is_simple and int(high) - low > _FEW:
                free += 1  # what one of them takes the others cannot take
            else:
                ways *= _ways_to_repeat(low, high, body, length)
        elif op is ops.BRANCH:
            ways *= sum(_ways(list(branch), length) for branch in value[1])
        elif op is ops.SUBPATTERN:
            ways *= _ways(list(value[3]), length)
        elif op in (ops.ASSERT, ops.ASSERT_NOT):
            ways *= 1 + _ways(list(value[1]), length)
        elif op is ops.ATOMIC_GROUP:
            ways *= _ways(list(value), length)
        elif op is ops.GROUPREF_EXISTS:
            ways *= sum(_ways(list(branch), length) for branch in value[1:] if branch is not None)
        if ways > TOO_MANY:  # enough to know; no numbers of thousands of digits
            return TOO_MANY
    return min(ways * math.comb(length + free, free), TOO_MANY)


def _ways_to_repeat(low: int, high: Any, body: Any, length: int) -> int:
    inner, shortest = _ways(list(body), length), int(body.getwidth()[0])
    if shortest == 0 and low > length:
        return TOO_MANY  # `re` repeats even nothing as often as it is told to
    most = max(min(int(high), length // max(shortest, 1) + 1), low)
    counts = most - low + 1
    if inner == 1:
        return counts
    return counts * int(inner**most) if most < 64 else TOO_MANY
