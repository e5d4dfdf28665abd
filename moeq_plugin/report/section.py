"""What a report is made of: sections of sentences, tables, charts and quotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moeq_plugin.report.charts import Chart


@dataclass(frozen=True)
class Table:
    """A table; cells are text.

    Attributes:
        caption: what it lists.
        head: titles of the columns.
        rows: cells.
        num_text_columns: how many columns at the start are words; the others are numbers.
        marked: indices of rows that deserve a look.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text_columns: int = 1
    marked: frozenset[int] = frozenset()


@dataclass
class Section:
    """One part of the page.

    Attributes:
        name: anchor.
        title: heading.
        notes: paragraphs before everything else.
        parts: charts and tables, in order.
        quotes: (heading, text) of sample texts.
        missing: how to get what is not there, a sentence each.
    """

    name: str
    title: str
    notes: list[str] = field(default_factory=list)
    parts: list[Chart | Table] = field(default_factory=list)
    quotes: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Return whether there is nothing to show but how to get it."""
        return not (self.notes or self.parts or self.quotes)

    @property
    def charts(self) -> list[Chart]:
        """Return the charts among the parts."""
        return [part for part in self.parts if isinstance(part, Chart)]


def number(value: float | None, digits: int = 4) -> str:
    """Return significant digits, a dash for nothing.

    Example:
        >>> number(0.0123456), number(None), number(1234.5)
        ('0.01235', '–', '1234')
    """
    if value is None:
        return "–"
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text


def with_error(value: float | None, error: float | None, digits: int = 4) -> str:
    """Return a value and its standard error, to the digit that the error reaches.

    Example:
        >>> with_error(0.0682612, 0.00234), with_error(16.2, None), with_error(0.5, 0.0)
        ('0.0683 ± 0.0023', '16.2', '0.5')
    """
    if value is None or not error:
        return number(value, digits)
    places = max(0, min(8, 1 - _exponent(error)))
    return f"{value:.{places}f} ± {error:.{places}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share in percent, a dash for nothing."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def size(num_bytes: float) -> str:
    """Return bytes with a unit that people read.

    Example:
        >>> size(1_234_567), size(16.9e9)
        ('1.23 MB', '16.9 GB')
    """
    unit, name = unit_of(num_bytes)
    return f"{num_bytes / unit:.3g} {name}"


def unit_of(num_bytes: float) -> tuple[float, str]:
    """Return the bytes of the unit that suits a size, and its name."""
    units = ((1e9, "GB"), (1e6, "MB"))
    return next((unit for unit in units if num_bytes >= unit[0]), (1e3, "kB"))


def _exponent(value: float) -> int:
    return int(f"{value:e}".split("e")[1])
