"""The models that numbers are measured on, with text to calibrate and text to measure.

The shipped model needs nothing but this repository. ``moe_small`` lies beside a development
checkout and is skipped where it is absent.
"""

from __future__ import annotations

import lzma
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
SEPARATOR = "\x1e"


@dataclass(frozen=True)
class Corpus:
    """A model's directory and its documents."""

    name: str
    model: Path
    calibration: list[str]
    heldout: list[str]

    def calibration_set(self, num_sequences: int, length: int, seed: int) -> Dataset:
        """Return random windows of the calibration documents as ``input_ids``."""
        ids = _windows(self.model, self.calibration, num_sequences, length, seed)
        return Dataset.from_dict({"input_ids": ids.tolist()})

    def heldout_batches(self, num_sequences: int, length: int) -> list[torch.Tensor]:
        """Return the same windows of held-out documents at every call, eight to a batch."""
        return list(_windows(self.model, self.heldout, num_sequences, length, seed=0).split(8))


def corpora() -> list[Corpus]:
    """Return what can be measured on this machine."""
    assets = ROOT / "examples" / "assets"
    found = [
        Corpus(
            "tiny_moe",
            assets / "tiny_moe",
            (assets / "calibration.txt").read_text().split(SEPARATOR),
            (assets / "heldout.txt").read_text().split(SEPARATOR),
        )
    ]
    domains = domains_of_moe_small()
    if domains:
        calibration = [document for domain in domains for document in domain.calibration]
        heldout = [document for domain in domains for document in domain.heldout]
        found.append(Corpus("moe_small", domains[0].model, calibration, heldout))
    return found


def domains_of_moe_small() -> list[Corpus]:
    """Return one corpus per kind of text that ``moe_small`` was trained on; none without it."""
    model, text = SHARED / "models" / "moe_small", SHARED / "data" / "text" / "train"
    if not model.is_dir():
        return []
    return [
        Corpus(
            domain,
            model,
            _unpack(text / f"{domain}.txt.xz"),
            (text / f"{domain}.valid.txt").read_text().split(SEPARATOR),
        )
        for domain in ("wiki", "code", "math", "stories", "multi", "docs")
    ]


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
