"""Data sets on disk: JSON lines with text or token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def read_dataset(path: Path | None) -> Any:
    """Return the data set of a JSON lines file, ``None`` for no path.

    Raises:
        ValueError: if there is no such file, or it holds something else.
    """
    if path is None:
        return None
    from datasets import load_dataset

    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected JSON lines with `text` or `input_ids`")
    try:
        return load_dataset("json", data_files=str(path), split="train")
    except Exception as error:  # whatever a file of something else makes a parser do
        raise ValueError(
            f"{path} cannot be read as JSON lines with `text` or `input_ids`: {error}"
        ) from error
