"""What a command calibrates on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Data:
    """A data set as a command was asked to use it.

    Attributes:
        path: JSON lines; ``None`` lets the model write its own text.
        num_sequences: at most.
        seq_len: tokens per sequence, at most.
    """

    path: Path | None
    num_sequences: int
    seq_len: int
