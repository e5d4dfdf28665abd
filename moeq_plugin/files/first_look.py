"""What can be told of a data file at once, before the packages that read it are imported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from moeq_plugin.files.data_columns import reading_of
from moeq_plugin.untrusted.reading import open_regular

_LINES = {".jsonl", ".ndjson"}
_TEXTS = {".txt", ".md"}
_LOOKED_AT = 1 << 20  # bytes; what stands behind them is judged when it is read


def check_first_rows(path: Path, num_rows: int) -> None:
    """Refuse a file with nothing in it, and rows that are no JSON or have no column to read.

    Args:
        path: of any kind of file; of packed and binary ones only the size is looked at.
        num_rows: that will be read.

    Raises:
        ValueError: saying what is wrong, and in which line.
    """
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: it has no row")
    suffix = path.suffix.lower()
    if suffix in _LINES | _TEXTS and _is_blank(path):
        raise ValueError(f"{path} has no row: there is nothing but blanks in it")
    if suffix in _LINES:
        _check_lines(path, num_rows)


def _is_blank(path: Path) -> bool:
    with open_regular(path) as file:
        return not any(block.strip() for block in iter(lambda: file.read(_LOOKED_AT), b""))


def _check_lines(path: Path, num_rows: int) -> None:
    columns: dict[str, None] = {}
    with open_regular(path) as file:
        for number, line in islice(_whole_lines(file.read(_LOOKED_AT + 1)), max(num_rows, 0)):
            columns.update(dict.fromkeys(_row(path, number, line)))
        is_all_seen = file.tell() <= _LOOKED_AT
    if columns and is_all_seen:
        try:
            reading_of(list(columns), None, 1, False)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _whole_lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers; one that was cut off is none."""
    lines = content.split(b"\n")
    if len(content) > _LOOKED_AT:
        del lines[-1]
    yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read as a data set: line {number} is not JSON ({error})"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(
            f"{path} cannot be read as a data set: line {number} is not a JSON object with columns"
        )
    return row
