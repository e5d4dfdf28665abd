"""Text of a stranger's file on its way to a screen, a page or a card."""

from __future__ import annotations

import re

_MAX_LENGTH = 2000  # characters of a line
_MARKUP = re.compile(r"<|\]\(")


def harmless(text: str, limit: int = _MAX_LENGTH) -> str:
    r"""Return text that only shows: no control or direction character, and one short line.

    A terminal would obey escape sequences, and a carriage return would write over what we said.

    Args:
        text: of any origin.
        limit: characters to keep.

    Example:
        >>> harmless("a" + chr(27) + "[2J" + chr(13) + "0 errors")
        'a\\x1b[2J\\r0 errors'
    """
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def one_line(text: str, limit: int = _MAX_LENGTH) -> str:
    """Return a message of several lines as one."""
    return harmless(" ".join(text[: 2 * limit].split()), limit)


def markdown(line: str) -> str:
    r"""Return a line of Markdown in which nothing is HTML, a link or an image.

    Example:
        >>> markdown("<img src=x> [a](b)")
        '&lt;img src=x> [a]\\(b)'
    """
    return _MARKUP.sub(lambda found: "&lt;" if found[0] == "<" else "]\\(", harmless(line))
