"""What a command calibrates on, and the options that say so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moeq_plugin.cli.shared import say

Datasets = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        help="txt, jsonl, json, csv, parquet, arrow, a directory or a name on a hub, with columns "
        "`text`, `messages` or the like; several mix, NAME:0.7 gives shares; default: text that "
        "the model writes itself",
    ),
]
NumSamples = Annotated[int, typer.Option(help="sequences to calibrate on")]
MaxSeqLength = Annotated[int, typer.Option(help="tokens per sequence")]
ChatTemplate = Annotated[
    bool, typer.Option(help="write conversations as the tokenizer's template does")
]


@dataclass(frozen=True)
class Data:
    """A data set as a command was asked to use it.

    Attributes:
        sources: each as :meth:`moeq_plugin.files.data_source.DataSource.parse` reads it; none lets
            the model write its own text.
        num_sequences: at most.
        seq_len: tokens per sequence, at most.
        chat_template: whether conversations go through the tokenizer's template.
    """

    sources: tuple[str, ...]
    num_sequences: int
    seq_len: int
    chat_template: bool = True

    def or_written(self) -> dict[str, Any]:
        """Return arguments of ``oneshot`` that let the model write a set where there is none."""
        if self.sources:
            return {}
        return {"dataset": "ebss", "num_calibration_samples": 128, "max_seq_length": 512}

    def reads(self) -> dict[str, Path]:
        """Return the places that are read, for :func:`moeq_plugin.files.places.check_places`."""
        from moeq_plugin.files.data_source import DataSource

        return {f"--dataset {name}": Path(DataSource.parse(name).name) for name in self.sources}

    def check(self) -> None:
        """Look whether the sources are there, before anything is loaded.

        Raises:
            ValueError: naming the one that is not.
        """
        from moeq_plugin.files.data_source import DataSource

        for source in self.sources:
            found = DataSource.parse(source)
            found.check()
            found.check_first_rows(self.num_sequences)

    def read(self, tokenizer: Any) -> Any:
        """Return the data set and say what was read; ``None`` where there is no source.

        Args:
            tokenizer: of the model.
        """
        from moeq_plugin.files.datasets import gather

        if not self.sources:
            return None
        tokens = max(self.seq_len, 1)  # the run refuses what is less, in its own words
        found = gather(self.sources, self.num_sequences, tokenizer, tokens, self.chat_template)
        shortage = f"; {found.shortage}" if found.shortage else ""
        say(f"calibrating on {found.summary}{shortage}", err=True)
        return found.dataset
