"""What pydantic finds wrong with the fields of a modifier, in words of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moeq_plugin.untrusted.text import one_line

_SHOWN = 4


def is_validation_error(error: BaseException) -> bool:
    """Tell an error of pydantic, which need not be installed."""
    return type(error).__name__ == "ValidationError" and hasattr(error, "errors")


def in_words(error: Any) -> str:
    """Return a validation error as one sentence for each field, without types and addresses.

    Args:
        error: of pydantic.
    """
    found = list(_sentences(error))
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return one_line("; ".join(found[:_SHOWN]) + more)


def _sentences(error: Any) -> Iterator[str]:
    for of in error.errors():
        field = ".".join(map(str, of["loc"]))
        message = str(of["msg"]).removeprefix("Value error, ")
        if of["type"] == "extra_forbidden":
            yield f"{field} is no field of {error.title}"
            continue
        if message.startswith("Input should be "):
            rest = message.removeprefix("Input should be ").removeprefix("a valid ")
            message = f"expected {rest}, got {of['input']!r}"
        yield f"{field}: {message}" if field else message
