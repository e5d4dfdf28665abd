"""Lists of names and patterns, and which of them is the first that fits a name.

Allocations list thousands of exact names, and so do tools that write each as a pattern of its own:
names are looked up, and only what can fit several names is tried one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from moeq_plugin.untrusted.patterns import Matcher, compiled

_EXACT = re.compile(r"\^?((?:\w|\\\.)+)\$", re.ASCII)  # a pattern that fits one name only


class Targets:
    """An ordered list of names and of patterns, which begin with ``re:``.

    Args:
        targets: the list.

    Raises:
        ValueError: if a pattern is none, or cannot be matched in bounded time.
    """

    def __init__(self, targets: Iterable[str]) -> None:
        self._exact: dict[str, tuple[int, str]] = {}
        self._patterns: list[tuple[int, str, Matcher]] = []
        for number, target in enumerate(targets):
            pattern = target.removeprefix("re:") if target.startswith("re:") else None
            name = target if pattern is None else _only_name(pattern)
            if name is not None:
                self._exact.setdefault(name, (number, target))
            elif pattern is not None:
                self._patterns.append((number, target, compiled(pattern)))

    @property
    def num_patterns(self) -> int:
        """Return how many of them are tried one by one."""
        return len(self._patterns)

    def first(self, name: str) -> str | None:
        """Return the first target that is the name, or a pattern that fits at its start."""
        number, found = self._exact.get(name, (None, None))
        for place, target, matcher in self._patterns:
            if number is not None and place > number:
                break
            if matcher.match(name):
                return target
        return found

    def __contains__(self, name: str) -> bool:
        return self.first(name) is not None


def _only_name(pattern: str) -> str | None:
    found = _EXACT.fullmatch(pattern)
    return found[1].replace("\\.", ".") if found else None
