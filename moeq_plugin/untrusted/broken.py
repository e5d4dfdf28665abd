"""What reading a broken file raises, and how that is said in a sentence."""

from __future__ import annotations

import struct
from pathlib import Path

from moeq_plugin.untrusted.text import harmless, one_line

_PACKAGE = Path(__file__).parents[1]
_SENTENCES = (ValueError, OSError, ImportError)  # their messages are written for people
# Everything that a file which is not what it says makes a reader raise: wrong types and missing
# keys, numbers out of range, nesting and sizes that nothing holds, tensors that do not fit.
BROKEN: tuple[type[Exception], ...] = (
    *_SENTENCES,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    struct.error,
)


class UnreadableFileError(ValueError):
    """A file is not what its name says."""


def sentence(error: BaseException) -> str:
    """Return an error as one harmless line; where its message is no sentence, with its type.

    Example:
        >>> sentence(ValueError("two" + chr(10) + "lines"))
        'two lines'
        >>> sentence(KeyError("weights"))
        "KeyError: 'weights'"
    """
    text = one_line(str(error))
    if isinstance(error, _SENTENCES) and text:
        return text
    return harmless(f"{type(error).__name__}: {text}")


def origin(error: BaseException) -> str:
    """Return where in our code an error came up whose message is no sentence; empty for others."""
    if isinstance(error, _SENTENCES):
        return ""
    found, trace = "", error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.is_relative_to(_PACKAGE):
            found = f" ({file.relative_to(_PACKAGE).as_posix()}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return found
