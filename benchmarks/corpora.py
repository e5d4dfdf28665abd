"""The models that numbers are measured on, with text to calibrate and text to measure.

The shipped model needs nothing but this repository. ``moe_small`` lies beside a development
checkout, ``reference_moe`` is made by ``train_reference_moe.py`` and Gemma by ``make gemma``;
what is absent is skipped.
"""

from __future__ import annotations

import lzma
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
BUILT = ROOT / "build"
MOE_SMALL = SHARED / "models" / "moe_small"
SEPARATOR = "\x1e"
KINDS = ("wiki", "code", "math", "stories", "multi", "docs")
KINDS_OF_GEMMA = ("wiki", "code", "math", "multi")


@dataclass(frozen=True)
class Corpus:
    """A model's directory and its documents."""

    name: str
    model: Path
    calibration: list[str]
    heldout: list[str]

    @property
    def is_dense(self) -> bool:
        """Tell Gemma from the Mixture-of-Experts models."""
        return self.model.name.startswith("gemma")

    def calibration_set(self, num_sequences: int, length: int, seed: int) -> Dataset:
        """Return random windows of the calibration documents as ``input_ids``."""
        ids = _windows(self.model, self.calibration, num_sequences, length, seed)
        return Dataset.from_dict({"input_ids": ids.tolist()})

    def heldout_batches(self, num_sequences: int, length: int) -> list[torch.Tensor]:
        """Return the same windows of held-out documents at every call, eight to a batch."""
        return list(_windows(self.model, self.heldout, num_sequences, length, seed=0).split(8))


def corpora() -> list[Corpus]:
    """Return the Mixture-of-Experts models that can be measured on this machine."""
    assets = ROOT / "examples" / "assets"
    found = [
        Corpus(
            "tiny_moe",
            assets / "tiny_moe",
            (assets / "calibration.txt").read_text().split(SEPARATOR),
            (assets / "heldout.txt").read_text().split(SEPARATOR),
        )
    ]
    for model in (MOE_SMALL, BUILT / "reference_moe"):
        if (model / "config.json").is_file():
            found.append(_mixture(model, KINDS))
    return found


def dense_corpora() -> list[Corpus]:
    """Return Gemma where ``make gemma`` has been run; at 4 bits it says nothing."""
    model = BUILT / "gemma3_270m"
    return [_mixture(model, KINDS_OF_GEMMA)] if (model / "config.json").is_file() else []


def kinds_of_text(model: Path, kinds: Sequence[str]) -> list[Corpus]:
    """Return one corpus per kind of text, named after it; none where the text is missing."""
    text = SHARED / "data" / "text" / "train"
    if not text.is_dir():
        return []
    return [
        Corpus(
            kind,
            model,
            _unpack(text / f"{kind}.txt.xz"),
            (text / f"{kind}.valid.txt").read_text().split(SEPARATOR),
        )
        for kind in kinds
    ]


def _mixture(model: Path, kinds: Sequence[str]) -> Corpus:
    """Return all kinds of text as one corpus, in which all documents are equally likely."""
    parts = kinds_of_text(model, kinds)
    calibration = [document for part in parts for document in part.calibration]
    heldout = [document for part in parts for document in part.heldout]
    return Corpus(model.name, model, calibration, heldout)


def _unpack(path: Path) -> list[str]:
    with lzma.open(path, "rt") as file:
        return file.read(2_000_000).split(SEPARATOR)


def _windows(
    model: Path, documents: list[str], num_sequences: int, length: int, seed: int
) -> torch.Tensor:
    """Return ``[num_sequences, length]`` windows that start at random places of the text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = random.Random(seed)
    rows: list[list[int]] = []
    while len(rows) < num_sequences:
        document = rng.choice(documents)
        start = rng.randrange(max(1, len(document) - 8 * length))
        text = document[start : start + 16 * length]
        ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        if len(ids) >= length:
            rows.append(ids[:length])
    return torch.tensor(rows)
