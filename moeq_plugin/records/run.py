"""The record of a run, ``moeq_run.json``: every linear, what its second moments rest on, its loss.

Standard library only. A reader checks ``schema_version``: it rises when a field changes meaning.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from moeq_plugin.records.sampling import SamplingReport
from moeq_plugin.untrusted.broken import BROKEN, sentence
from moeq_plugin.untrusted.reading import MAX_LIST_BYTES, read_json
from moeq_plugin.untrusted.typed import build

SCHEMA_VERSION = 1
FILE_NAME = "moeq_run.json"


class Basis(StrEnum):
    """What the second moments of a linear rest on."""

    OWN = "own"  # its own tokens
    SHRUNK = "shrunk"  # too few tokens of its own: mixed with those of the whole layer
    LAYER = "layer"  # no token of its own: those of the whole layer
    FEW = "few"  # its own tokens, too few, where there is no layer of experts to borrow from
    NONE = "none"  # nothing usable: weights rounded to nearest


@dataclass(frozen=True)
class LinearRecord:
    """What happened to one linear.

    Attributes:
        name: module name.
        scheme: bits, symmetry and group size, such as ``W4 symmetric group 128``.
        basis: what its second moments rest on.
        effective_tokens: ``(sum a)^2 / sum a^2`` of the tokens' weights.
        loss: mean over its tokens, by weight, of the squared change of the output vector, as far
            as the second moments see it; ``None`` after rounding to nearest.
    """

    name: str
    scheme: str
    basis: Basis
    effective_tokens: float
    loss: float | None


@dataclass
class RunRecord:
    """Everything that one modifier did.

    Attributes:
        modifier: class name.
        settings: its arguments as given and resolved.
        versions: of the libraries that took part.
        linears: one record per targeted linear.
        limits: what a reader of the checkpoint has to know, one sentence each.
        kept: targeted modules left in 16 bit, with the reason.
        uniformity: where weights were scored, both proxies of each and whether it stayed scalar.
        smoothed: scales that were moved between modules, by the module whose output shrank: what
            the choice rests on and its loss before and after.
        left_out: modules whose output was not scaled, and why.
        uncorrected: decoder layers that were rounded without the corrected target that was asked
            for, and why; ``model`` where it is all of them.
        clipped: linears whose outliers were clamped: loss after as a share of the loss before.
        bits_per_weight: of the quantized weights with all that is stored for them, where known.
        model: name or path of the model before quantization, empty where unknown.
        calibration: what it was calibrated on, in words; empty where unknown.
        sampling: what the text is like that the model wrote for itself, if it did.
        run: what else a reader wants to know of the run, such as ``hardware`` or ``wall time``.
        given: names of the arguments that say something else than their default; empty where
            unknown.
    """

    modifier: str
    settings: dict[str, Any]
    versions: dict[str, str]
    linears: list[LinearRecord] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    uniformity: dict[str, dict[str, Any]] = field(default_factory=dict)
    smoothed: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    uncorrected: dict[str, str] = field(default_factory=dict)
    clipped: dict[str, float] = field(default_factory=dict)
    bits_per_weight: float | None = None
    model: str = ""
    calibration: str = ""
    sampling: SamplingReport | None = None
    run: dict[str, str] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)

    @property
    def unit(self) -> str:
        """Return what is counted: RWKV may have quantized vectors, which are no linears."""
        return "linears" if self.settings.get("elementwise") is None else "weights"

    def count(self, basis: Basis) -> int:
        """Return how many linears rest on ``basis``."""
        return sum(record.basis is basis for record in self.linears)

    def summary(self, num_targets: int) -> str:
        """Return the one line that says whether the run was healthy.

        Args:
            num_targets: how many weights were to be quantized.
        """
        if self.smoothed or self.left_out:
            return self._smoothing_summary()
        tail = ""
        if self.linears:
            worst = min(self.linears, key=lambda record: record.effective_tokens)
            tail = f"; fewest effective tokens {worst.effective_tokens:.1f} ({worst.name})"
        num_few = self.count(Basis.FEW)
        few = f"{num_few} on fewer tokens than they need, " if num_few else ""
        return (
            f"quantized {len(self.linears)} of {num_targets} {self.unit}, "
            f"{self.count(Basis.SHRUNK)} on Hessians mixed with the layer's, "
            f"{self.count(Basis.LAYER)} on the layer's alone, "
            f"{few}{self.count(Basis.NONE)} rounded to nearest{tail}"
        )

    def _smoothing_summary(self) -> str:
        bases = [of["basis"] for of in self.smoothed.values()]
        weighted = [name for name, of in self.smoothed.items() if of["weighted"]]
        tail = f"; clipped {len(self.clipped)} linears" if self.clipped else ""
        if weighted:
            worst = min(weighted, key=lambda name: self.smoothed[name]["effective_tokens"])
            fewest = self.smoothed[worst]["effective_tokens"]
            tail += f"; fewest effective tokens {fewest:.1f} ({worst})"
        return (
            f"smoothed {len(bases)} of {len(bases) + len(self.left_out)} modules, {len(weighted)} "
            f"of them weighted by a router, {bases.count(Basis.SHRUNK)} on Hessians mixed "
            f"with the layer's, {bases.count(Basis.LAYER)} on the layer's alone{tail}"
        )

    @classmethod
    def load(cls, directory: Path) -> list[RunRecord]:
        """Read what :func:`save_records` wrote.

        Raises:
            ValueError: if the file is not such a record, or of another schema version.
        """
        path = directory / FILE_NAME
        try:
            content = read_json(path, MAX_LIST_BYTES)
            version = content.get("schema_version")
            if version == SCHEMA_VERSION:
                return [build(cls, run) for run in content["runs"]]
        except BROKEN as error:
            raise ValueError(f"{path} is not the record of a run: {sentence(error)}") from error
        raise ValueError(
            f"{path} has schema version {ascii(version)}, this package reads {SCHEMA_VERSION}"
        )


def save_records(records: list[RunRecord], directory: Path) -> Path:
    """Write ``moeq_run.json``, one entry per modifier that took part; return its path."""
    path = directory / FILE_NAME
    content = {"schema_version": SCHEMA_VERSION, "runs": [asdict(record) for record in records]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
