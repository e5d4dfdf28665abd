"""A pattern as an automaton that reads a name once, from its end to its start.

For each place in the name, from the last to the first, it keeps the set of states from which the
rest of the name fits. That set follows from the one after it and the character between, so looking
ahead is one more state, and every set that was met is remembered: a known step is one look-up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from re import _compiler as compiler  # type: ignore[attr-defined] # as in patterns.py
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

_MAX_STATES = 4000
_MAX_STEPS = 20_000  # remembered
_CHARACTERS = (ops.LITERAL, ops.NOT_LITERAL, ops.ANY, ops.IN)
_REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT)  # both fit the same names


@dataclass
class _Part:
    """The states of a pattern, or of what one looks ahead for.

    Attributes:
        end: the state from which everything fits.
        characters: ``(state, test of a character, state after it)``.
        before: the states that lead to a state without reading anything.
        places: ``(state, test of a place, state after it)``, such as the end of the name.
        ahead: ``(state, part, its first state, whether it must not fit, state after it)``.
    """

    end: int = 0
    characters: list[tuple[int, Any, int]] = field(default_factory=list)
    before: dict[int, list[int]] = field(default_factory=dict)
    places: list[tuple[int, Any, int]] = field(default_factory=list)
    ahead: list[tuple[int, _Part, int, bool, int]] = field(default_factory=list)


class Automaton:
    """A matcher with the meaning of ``re``.

    Args:
        tree: of the parser of ``re``.

    Raises:
        ValueError: if the pattern refers to groups, looks behind, is possessive, or is so large
            with its repeats written out that no one wrote it by hand.
    """

    def __init__(self, tree: Any) -> None:
        self._flags: int = tree.state.flags
        self._count = 0
        self._looks_around = False
        self._part = _Part()
        self._part.end = self._state()
        self._first = self._add(self._part, list(tree), self._part.end, ())
        self._steps: dict[tuple[frozenset[int], str, bool], frozenset[int]] = {}

    def match(self, name: str) -> bool:
        """Tell whether the pattern fits at the start of a name."""
        fitting = self._at(frozenset(), name, len(name))
        for place in range(len(name) - 1, -1, -1):
            near = _near(name, place) if self._looks_around else name[place]
            key = (fitting, near, place == 0)
            found = self._steps.get(key)
            if found is None:
                if len(self._steps) >= _MAX_STEPS:
                    self._steps.clear()
                found = self._steps[key] = self._at(fitting, name, place)
            fitting = found
        return self._first in fitting

    def _at(self, after: frozenset[int], name: str, place: int) -> frozenset[int]:
        """Return the states from which the name fits at a place, given those one further on."""
        fitting: set[int] = set()
        self._close(self._part, after, name, place, fitting)
        return frozenset(fitting)

    def _close(
        self, part: _Part, after: frozenset[int], name: str, place: int, fitting: set[int]
    ) -> None:
        leads: dict[int, list[int]] = {}  # over tests that succeed here
        for state, of, first, is_negated, then in part.ahead:
            self._close(of, after, name, place, fitting)
            if (first in fitting) != is_negated:
                leads.setdefault(then, []).append(state)
        for state, test, then in part.places:
            if test.match(_near(name, place), min(place, 1)):
                leads.setdefault(then, []).append(state)
        waiting = [part.end]
        if place < len(name):
            letter = name[place]
            waiting += [s for s, test, then in part.characters if then in after and test(letter)]
        while waiting:
            state = waiting.pop()
            if state not in fitting:
                fitting.add(state)
                waiting += part.before.get(state, ())
                waiting += leads.get(state, ())

    def _state(self) -> int:
        self._count += 1
        if self._count > _MAX_STATES:
            raise ValueError(
                f"the pattern needs more than {_MAX_STATES} states; write a shorter one"
            )
        return self._count

    def _add(self, part: _Part, items: list[tuple[Any, Any]], then: int, scope: Any) -> int:
        """Add states for items that come before the state ``then``; return the first of them."""
        for op, value in reversed(items):
            then = self._add_item(part, op, value, then, scope)
        return then

    def _add_item(self, part: _Part, op: Any, value: Any, then: int, scope: Any) -> int:
        if op in _REPEATS:
            low, high, body = value
            return self._add_repeat(part, low, high, body, then, scope)
        if op is ops.SUBPATTERN:
            _, added, removed, body = value
            inner = (*scope, (added, removed)) if added or removed else scope
            return self._add(part, list(body), then, inner)
        state = self._state()
        if op in _CHARACTERS:
            part.characters.append((state, self._test(op, value, scope).match, then))
        elif op is ops.AT:
            self._looks_around = True
            part.places.append((state, self._test(op, value, scope), then))
        elif op is ops.BRANCH:
            for branch in value[1]:
                self._lead(part, state, self._add(part, list(branch), then, scope))
        elif op in (ops.ASSERT, ops.ASSERT_NOT) and value[0] > 0:
            ahead = _Part(end=self._state())
            first = self._add(ahead, list(value[1]), ahead.end, scope)
            part.ahead.append((state, ahead, first, op is ops.ASSERT_NOT, then))
        elif op is not ops.FAILURE:
            raise ValueError(
                "a pattern with many ways to fit must not refer to groups, look behind or be "
                f"possessive ({str(op).lower()}): write it without a repeat inside a repeat"
            )
        return state

    def _add_repeat(
        self, part: _Part, low: int, high: Any, body: Any, then: int, scope: Any
    ) -> int:
        if low > _MAX_STATES:  # even of nothing
            raise ValueError(f"the pattern repeats {low} times; write a shorter one")
        items, end = list(body), then
        if high is ops.MAXREPEAT:
            again = self._state()
            self._lead(part, again, then)
            self._lead(part, again, self._add(part, items, again, scope))
            then = again
        else:
            for _ in range(int(high) - low):  # one inside the other: b? of (b(b)?)?
                skip = self._state()
                self._lead(part, skip, self._add(part, items, then, scope))
                self._lead(part, skip, end)
                then = skip
        for _ in range(low):
            then = self._add(part, items, then, scope)
        return then

    def _lead(self, part: _Part, state: int, to: int) -> None:
        part.before.setdefault(to, []).append(state)

    def _test(self, op: Any, value: Any, scope: Any) -> Any:
        """Return what tests one item as ``re`` would, ranges, classes and flags included."""
        state = parser.State()
        state.flags = self._flags
        item = parser.SubPattern(state, [(op, value)])
        for added, removed in reversed(scope):
            item = parser.SubPattern(state, [(ops.SUBPATTERN, (None, added, removed, item))])
        return compiler.compile(item, 0)


def _near(name: str, place: int) -> str:
    """Return all that a test of a place can see: ``$`` also fits before the last line break."""
    return name[max(place - 1, 0) : place + 2]
