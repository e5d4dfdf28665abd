"""Data sets on disk: JSON lines with text or token ids."""

from __future__ import annotations

import json
from io import BufferedReader
from pathlib import Path
from typing import Any

from moeq_plugin.untrusted.broken import sentence
from moeq_plugin.untrusted.reading import open_regular

_MAX_ROW_BYTES = 256 << 20


def read_dataset(path: Path | None, num_rows: int) -> Any:
    """Return the first rows of a JSON lines file as a data set, ``None`` for no path.

    What follows them is not even read: files for training have millions of rows.

    Args:
        path: of the file.
        num_rows: at most.

    Raises:
        ValueError: if there is no such file, it holds something else, or no row is wanted.
    """
    if path is None:
        return None
    from datasets import Dataset

    if num_rows < 1:
        raise ValueError(f"at least 1 row of {path} is needed, {num_rows} were asked for")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected JSON lines with `text` or `input_ids`")
    try:
        with open_regular(path) as file:
            rows = _rows(file, num_rows)
        columns = dict.fromkeys(column for row in rows for column in row)
        return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})
    except Exception as error:  # whatever a file of something else makes a parser do
        raise ValueError(
            f"{path} cannot be read as JSON lines with `text` or `input_ids`: {sentence(error)}"
        ) from error


def _rows(file: BufferedReader, num_rows: int) -> list[dict[str, Any]]:
    """Return the first rows that are not empty lines.

    Raises:
        ValueError: if a line is no JSON object, or too long to be one.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(iter(lambda: file.readline(_MAX_ROW_BYTES), b""), 1):
        if len(rows) >= num_rows:
            break
        if not line.strip():
            continue
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        rows.append(row)
    if not rows:
        raise ValueError("it has no row")
    return rows
