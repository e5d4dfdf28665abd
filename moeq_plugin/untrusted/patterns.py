"""Match patterns of strangers in a time that is bounded by their length and that of the name.

``re`` tries all ways in which a pattern can fit, and for ``(a+)+$`` there are ``2 ** n`` of them.
:func:`most_ways` counts from above how many there can be. A pattern with few is left to ``re``,
which is fastest; any other is run as an automaton, whose time is linear in the name. Readers that
know only ``re`` are not given a pattern with too many: :func:`check_for_readers`.
"""

from __future__ import annotations

import re
from functools import lru_cache

# no stubs describe the parser of `re`, whose tree is the only one that means what `re` means
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, Protocol

from moeq_plugin.untrusted.automaton import Automaton
from moeq_plugin.untrusted.ways import TOO_MANY, most_ways

MAX_NAME = 1024  # characters of a tensor's name; transformers' longest have some 150
MAX_PATTERN = 20_000
_FEW_WAYS = 1 << 16
# four repeats such as `.*` and something after them, at worst a fifth of a second for a name
_READERS_NAME, _READERS_WAYS = 100, 2 * 10**7
_READERS_WAYS_IN_ALL = 5 * _READERS_WAYS


class Matcher(Protocol):
    """What matches at the start of a name, as a compiled pattern does."""

    def match(self, name: str, /) -> object:
        """Return something true if it fits at the start of a name."""


@lru_cache(4096)
def compiled(pattern: str) -> Matcher:
    """Return a matcher that means the same as ``re.compile(pattern)`` and never runs away.

    Raises:
        ValueError: if it is no pattern, or one that cannot be matched in linear time: with
            references to groups or looking behind, and many ways to fit.
    """
    tree = _parsed(pattern)
    try:
        if most_ways(tree, MAX_NAME) <= _FEW_WAYS:
            return re.compile(pattern)
        return Automaton(tree)
    except (RecursionError, OverflowError):
        raise ValueError(f"the pattern {ascii(pattern)[:200]} is nested too deep") from None


def check_for_readers(pattern: str) -> int:
    """Refuse a pattern that would keep a reader busy which matches it by ``re``.

    Returns:
        In how many ways it can fit the name of a module at most.

    Raises:
        ValueError: if they are more than twenty million.
    """
    tree = _parsed(pattern)
    try:
        ways = most_ways(tree, _READERS_NAME)
    except RecursionError:
        ways = TOO_MANY
    if ways > _READERS_WAYS:
        raise ValueError(
            f"the pattern {ascii(pattern)[:200]} can fit a name in more than {_READERS_WAYS} ways, "
            "which readers would try one by one; write it without a repeat inside a repeat"
        )
    return ways


def check_content(content: Any) -> None:
    """Refuse a config or recipe with such a pattern anywhere in it.

    Args:
        content: plain data; patterns are the strings that begin with ``re:``, and the keys of
            ``dynamic`` of the GPTQ dialect.

    Raises:
        ValueError: likewise.
    """
    waiting, ways = [content], 0
    while waiting:
        found = waiting.pop()
        if isinstance(found, str) and found.startswith("re:"):
            ways += check_for_readers(found.removeprefix("re:"))
        elif isinstance(found, list | tuple):
            waiting.extend(found)
        elif isinstance(found, dict):
            waiting.extend(found.values())
            dynamic = found.get("dynamic")
            for pattern in dynamic if isinstance(dynamic, dict) else ():
                ways += check_for_readers(pattern.removeprefix("-:").removeprefix("+:"))
        if ways > _READERS_WAYS_IN_ALL:
            raise ValueError(
                f"its patterns can fit a name in more than {_READERS_WAYS_IN_ALL} ways"
            )


def _parsed(pattern: str) -> Any:
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"a pattern of {len(pattern)} characters; at most {MAX_PATTERN} are read")
    try:
        return parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as cause:
        raise ValueError(f"{ascii(pattern)[:200]} is no pattern: {cause}") from None
