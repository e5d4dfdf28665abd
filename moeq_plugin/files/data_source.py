"""One source of calibration data: what it is called, and its rows, read no further than needed.

The package ``datasets`` reads every format; what a stranger's file may not be, a pipe or a device,
is looked at before.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from moeq_plugin.files.first_look import check_first_rows
from moeq_plugin.untrusted.broken import sentence
from moeq_plugin.untrusted.reading import open_regular

_BUILDERS = {
    ".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".arrow": "arrow", ".txt": "text", ".md": "text",
}  # fmt: skip
_PACKED = {".gz", ".zst", ".xz", ".bz2"}
_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
KINDS = (
    "expected a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt), a directory that "
    "`save_to_disk` wrote, or the name of a data set on a hub (owner/name)"
)


@dataclass(frozen=True)
class DataSource:
    """A source as it was asked for.

    Attributes:
        name: a path, or the name of a data set on a hub.
        weight: its share of the rows, relative to those of the others.
    """

    name: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str | Path) -> DataSource:
        """Read ``NAME`` or ``NAME:WEIGHT``.

        Raises:
            ValueError: if the weight is not positive.

        Example:
            >>> DataSource.parse("code.jsonl:0.7")
            DataSource(name='code.jsonl', weight=0.7)
        """
        name, _, weight = str(text).rpartition(":")
        if not name or Path(text).exists() or not re.fullmatch(r"-?[\d.]+(e-?\d+)?", weight):
            return cls(str(text))
        if not 0 < float(weight) < float("inf"):
            raise ValueError(f"{text}: the weight of a data set must be positive, got {weight}")
        return cls(name, float(weight))

    @property
    def label(self) -> str:
        """Return what it is called in messages."""
        return Path(self.name).name if Path(self.name).exists() else self.name

    @property
    def is_text(self) -> bool:
        """Return whether it is one long text, to be cut into sequences."""
        return Path(self.name).is_file() and self._builder() == "text"

    def check(self) -> None:
        """Look whether it is there, without reading it.

        Raises:
            ValueError: if it is not, or of no kind that can be read.
        """
        path = Path(self.name)
        if path.is_file():
            if self._builder() is None:
                raise ValueError(f"{path}: files ending in {path.suffix!r} are not read; {KINDS}")
        elif path.exists() and not path.is_dir():
            open_regular(path).close()  # says that it is none
        elif not path.exists() and (path.parent.is_dir() or not _ID.fullmatch(self.name)):
            raise ValueError(f"{path} is not a file; {KINDS}")

    def check_first_rows(self, num_rows: int) -> None:
        """Look into it as far as that takes no time and no package.

        Args:
            num_rows: that will be read.

        Raises:
            ValueError: if there is nothing in it, or not what its name says.
        """
        if Path(self.name).is_file():
            check_first_rows(Path(self.name), num_rows)

    def _builder(self) -> str | None:
        suffixes = [s.lower() for s in Path(self.name).suffixes if s.lower() not in _PACKED]
        return _BUILDERS.get(suffixes[-1]) if suffixes else None


def read_rows(source: DataSource, limit: int) -> list[dict[str, Any]]:
    """Return the first rows; of a text its paragraphs.

    Args:
        source: what to read.
        limit: rows at most.

    Raises:
        ValueError: if it is not there, or not what its name says.
    """
    source.check()
    source.check_first_rows(limit)
    try:
        with _said_once():
            rows = list(islice(_rows(source), limit))
        if not rows:
            raise ValueError("it has no row")
    except Exception as error:  # whatever a file of something else makes a parser do
        raise ValueError(f"{source.name} cannot be read as a data set: {_cause(error)}") from error
    return rows


def _rows(source: DataSource) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    path, builder = Path(source.name), source._builder()
    if path.is_dir():
        yield from _of_directory(path)
        return
    if not path.exists():
        yield from load_dataset(source.name, split="train", streaming=True)
        return
    open_regular(path).close()
    settings: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    if builder == "text":
        settings = {"sample_by": "paragraph"}
    elif builder == "csv":
        settings |= {"keep_default_na": False}  # a text "NA" is a text
    # streamed: what follows the rows that are needed is not read, and nothing is written anywhere
    yield from load_dataset(
        builder, data_files=str(path), split="train", streaming=True, **settings
    )


def _of_directory(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of what ``save_to_disk`` wrote; of several splits those of ``train``.

    Raises:
        ValueError: if it is something else, or has no such split.
    """
    from datasets import Dataset, load_from_disk

    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(f"no `save_to_disk` wrote this directory; {KINDS}")
    found = load_from_disk(str(path))
    if not isinstance(found, Dataset):
        if "train" not in found:
            raise ValueError(f"its splits are {', '.join(found)}: give the directory of one")
        found = found["train"]
    yield from found


@contextmanager
def _said_once() -> Iterator[None]:
    """Keep ``datasets`` from logging what it raises."""
    logger = logging.getLogger("datasets.packaged_modules")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _cause(error: Exception) -> str:
    """Return why reading failed: what ``datasets`` raises names only itself."""
    cause = error.__cause__ if type(error).__module__.startswith("datasets") else None
    return sentence(cause if isinstance(cause, Exception) else error)
