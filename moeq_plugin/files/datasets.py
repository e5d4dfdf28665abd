"""Calibration data from what people have: files of any kind, data sets on disk and on hubs, mixed.

One reader for the command line and for Python, which says in a line what it read and left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeq_plugin.files.data_columns import reading_of
from moeq_plugin.files.data_source import DataSource, read_rows
from moeq_plugin.untrusted.broken import sentence

_CHARACTERS = 16  # of a text for each token that is wanted: more than any tokenizer joins


@dataclass(frozen=True)
class CalibrationData:
    """What was read.

    Attributes:
        dataset: with a column ``input_ids`` or ``text``, for ``oneshot``.
        summary: what it was read from and what was left out, in one line.
        shortage: that there are fewer rows than were asked for; empty if there are not.
    """

    dataset: Any
    summary: str
    shortage: str = ""


def read_dataset(
    sources: str | Path | Sequence[str | Path],
    num_rows: int = 512,
    *,
    tokenizer: Any = None,
    max_seq_length: int = 2048,
    chat_template: bool = True,
) -> CalibrationData:
    """Read calibration data; what follows the rows that are needed is not even looked at.

    Warns of fewer rows than were asked for.

    Args:
        sources: one or several, each a path or the name of a data set on a hub; ``NAME:WEIGHT``
            gives it a share of the rows.
        num_rows: of all of them, at most.
        tokenizer: of the model. Long texts, conversations and mixtures of kinds need it.
        max_seq_length: tokens that a long text is cut after.
        chat_template: let conversations be written as the tokenizer's template does.

    Raises:
        ValueError: if a source is not there or cannot be read, or has nothing to calibrate on in
            half of its rows.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    found = gather(given, num_rows, tokenizer, max_seq_length, chat_template)
    if found.shortage:
        warnings.warn(f"{found.summary}; {found.shortage}", stacklevel=2)
    return found


def gather(
    given: Sequence[str | Path], num_rows: int, tokenizer: Any, max_tokens: int, chat: bool
) -> CalibrationData:
    """Read calibration data as :func:`read_dataset` does, and leave saying so to the caller.

    Raises:
        ValueError: likewise.
    """
    wanted = [DataSource.parse(source) for source in given]
    if num_rows < len(wanted) or not wanted:
        names = ", ".join(source.name for source in wanted)
        raise ValueError(f"at least 1 row of {names} is needed, {num_rows} were asked for")
    for source in wanted:
        source.check()
    counts = shares([source.weight for source in wanted], num_rows)
    settings = (tokenizer, max_tokens, chat)
    parts = [_read(s, n, *settings) for s, n in zip(wanted, counts, strict=True)]
    summary = "; ".join(part.summary for part in parts)
    rows = interleaved([part.rows for part in parts])
    shortage = f"{_rows(num_rows)} were asked for" if len(rows) < num_rows else ""
    if len(parts) > 1:
        rows = [_ids_of(row, tokenizer, max_tokens) for row in rows]
    return CalibrationData(_as_dataset(rows), summary, shortage)


@dataclass(frozen=True)
class _Part:
    rows: list[dict[str, Any]]
    summary: str


def _read(source: DataSource, num_rows: int, tokenizer: Any, max_tokens: int, chat: bool) -> _Part:
    """Return at most ``num_rows`` rows of a source, each with ``input_ids`` or ``text``.

    Raises:
        ValueError: if half of them or more have nothing to calibrate on.
    """
    if source.is_text and tokenizer is not None:
        rows = _windows(source, num_rows, tokenizer, max_tokens)
        return _Part(rows, f"{source.label}: {len(rows)} pieces of {max_tokens} tokens at most")
    found = read_rows(source, num_rows)
    columns = list(dict.fromkeys(column for row in found for column in row))
    try:
        reading = reading_of(columns, tokenizer, max_tokens, chat)
        whole = [dict.fromkeys(columns) | row for row in found]
        read = [(row, reading.read(row)) for row in whole]
    except Exception as error:  # whatever a template of strangers makes of a row
        raise ValueError(f"{source.name}: {sentence(error)}") from error
    kept = [(row, said) for row, said in read if not _is_nothing(said)]
    empty = len(read) - len(kept)
    if 2 * empty >= len(read):
        first = next(n for n, (_, said) in enumerate(read) if _is_nothing(said))
        raise ValueError(
            f"{source.name}: {empty} of {len(read)} rows have no {reading.column} to calibrate on, "
            f"the first of them is row {first}"
        )
    left_out = f", {empty} left out: nothing in them" if empty else ""
    name = "input_ids" if reading.is_ids else "text"
    # as it stands in the source, with masks and whatever else is beside it
    is_plain = name in columns
    rows = [row if is_plain else {name: said} for row, said in kept]
    return _Part(rows, f"{source.label}: {_rows(len(kept))} of {reading.column}{left_out}")


def _is_nothing(said: Any) -> bool:
    """Tell a row without anything to calibrate on: blanks are tokens, and no text."""
    return not said.strip() if isinstance(said, str) else said is None or said == []


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _windows(
    source: DataSource, num_rows: int, tokenizer: Any, max_tokens: int
) -> list[dict[str, Any]]:
    """Return pieces of one long text, one after the other.

    Raises:
        ValueError: if there are only blanks in it.
    """
    wanted, texts = _CHARACTERS * num_rows * max_tokens, []
    for row in read_rows(source, 1 + wanted // 2):
        texts.append(row["text"])
        wanted -= len(row["text"])
        if wanted < 0:
            break
    if not any(text.strip() for text in texts):
        raise ValueError(f"{source.name} has no row: there is nothing but blanks in it")
    ids = tokenizer("\n\n".join(texts), verbose=False)["input_ids"]
    starts = range(0, len(ids), max_tokens)[:num_rows]
    pieces = [ids[start : start + max_tokens] for start in starts]
    return [{"input_ids": piece} for piece in pieces if piece]


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Divide rows by weights; each gets at least one, and together they are ``total``.

    Example:
        >>> shares([0.7, 0.3], 10)
        [7, 3]
    """
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [max(1, int(of)) for of in exact]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        far = [step * (of - count) for of, count in zip(exact, counts, strict=True)]
        able = [n for n, count in enumerate(counts) if count + step >= 1]
        counts[max(able, key=lambda n: far[n])] += step
    return counts


def interleaved(parts: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mix rows evenly, in an order that is always the same."""
    placed = [
        ((index + 0.5) / len(part), number, row)
        for number, part in enumerate(parts)
        for index, row in enumerate(part)
    ]
    return [row for *_, row in sorted(placed, key=lambda of: of[:2])]


def _ids_of(row: dict[str, Any], tokenizer: Any, max_tokens: int) -> dict[str, Any]:
    """Return a row of a mixture as ids: rows of different kinds stand in one column.

    Raises:
        ValueError: if there is no tokenizer.
    """
    if "input_ids" in row:
        return {"input_ids": row["input_ids"]}
    if tokenizer is None:
        raise ValueError("a mixture of data sets needs the tokenizer of the model")
    found = tokenizer(row["text"], truncation=True, max_length=max_tokens)
    return {"input_ids": found["input_ids"]}


def _as_dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    columns = dict.fromkeys(column for row in rows for column in row)
    return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})
