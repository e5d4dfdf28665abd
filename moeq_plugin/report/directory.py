"""Everything that a checkpoint's directory says about itself, as plain data.

A file that is missing or broken is a gap in the report, with a sentence, and never an exception.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moeq_plugin.checkpoint.checks.findings import Report
from moeq_plugin.records import quality
from moeq_plugin.records.quality import QualityRecord
from moeq_plugin.records.run import FILE_NAME as RECORD_FILE
from moeq_plugin.records.run import LinearRecord, RunRecord
from moeq_plugin.report.stored import Stored, read_stored
from moeq_plugin.untrusted.broken import BROKEN, sentence
from moeq_plugin.untrusted.reading import MAX_LIST_BYTES, read_json
from moeq_plugin.untrusted.text import harmless

SENSITIVITY_FILE = "moeq_sensitivity.json"
ALLOCATION_FILE = "moeq_allocation.json"
# what the sections read of these two, whose schemas belong to moeq_plugin.core
_KEYS = {
    SENSITIVITY_FILE: (
        "rows", "options", "domains", "loss", "num_bytes", "num_weights", "fixed_bytes",
    ),
    ALLOCATION_FILE: (
        "choice", "limit_bytes", "num_bytes", "bits_per_weight", "value", "robust", "target",
    ),
}  # fmt: skip
T = TypeVar("T")


@dataclass
class Findings:
    """What was found.

    Attributes:
        directory: of the checkpoint.
        records: of ``moeq_run.json``; empty without it.
        config: of ``config.json``; empty without it.
        stored: sizes of the safetensors files, ``None`` without any.
        table: of ``moeq_sensitivity.json`` as written, ``None`` without it.
        allocation: of ``moeq_allocation.json`` as written, ``None`` without it.
        quality: of ``moeq_eval.json``, ``None`` without it.
        front: points of the Pareto front, each with ``num_bytes`` of the checkpoint,
            ``bits_per_weight``, ``loss`` and ``counts`` of options; filled by who can solve it.
        verification: what ``moeq verify`` finds; filled by who has the time to read every weight.
        problems: a sentence for each file that could not be read.
    """

    directory: Path
    records: list[RunRecord] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    stored: Stored | None = None
    table: dict[str, Any] | None = None
    allocation: dict[str, Any] | None = None
    quality: QualityRecord | None = None
    front: list[dict[str, Any]] = field(default_factory=list)
    verification: Report | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def is_quantized(self) -> bool:
        """Return whether anything says that it is a quantized model."""
        return bool(self.records) or "quantization_config" in self.config

    @property
    def linears(self) -> list[LinearRecord]:
        """Return the linears of all records."""
        return [linear for record in self.records for linear in record.linears]

    @property
    def bits_per_weight(self) -> float | None:
        """Return true bits per quantized weight, from who knows it best."""
        known = [r.bits_per_weight for r in self.records if r.bits_per_weight is not None]
        if known:
            return known[-1]
        if self.stored is not None and self.stored.bits_per_weight is not None:
            return self.stored.bits_per_weight
        return None if self.allocation is None else float(self.allocation["bits_per_weight"])

    @property
    def model(self) -> str:
        """Return the name of the model before quantization, empty where nothing says it."""
        names = [record.model for record in self.records if record.model]
        return names[0] if names else self.quality.reference if self.quality else ""


def read_directory(directory: Path, *, evaluation: Path | None = None) -> Findings:
    """Read what is there.

    Args:
        directory: of the checkpoint.
        evaluation: what ``moeq eval --json`` wrote, if not into the directory.

    Raises:
        ValueError: if there is no such directory or file, or none that quantization wrote.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; expected that of a checkpoint")
    if evaluation is not None and not evaluation.is_file():
        raise ValueError(f"{evaluation} is not a file; expected what `moeq eval --json` wrote")
    found = Findings(directory)
    has_record = (directory / RECORD_FILE).exists()
    found.records = (_read(found, directory, RunRecord.load) if has_record else None) or []
    found.config = _read(found, directory / "config.json", _json) or {}
    found.table = _read(found, directory / SENSITIVITY_FILE, _json)
    found.allocation = _read(found, directory / ALLOCATION_FILE, _json)
    if evaluation is not None:  # asked for by name, so that it is no footnote if it is none
        found.quality = QualityRecord.load(evaluation)
    else:
        found.quality = _read(found, directory / quality.FILE_NAME, QualityRecord.load)
    found.stored = _read(found, directory, read_stored)
    if not (found.records or found.config):
        raise ValueError(
            f"{directory} has neither moeq_run.json nor config.json: it is not the directory of a "
            "checkpoint" + "".join(f"; {problem}" for problem in found.problems)
        )
    return found


def _read(found: Findings, path: Path, reader: Callable[[Path], T]) -> T | None:
    if not path.exists():
        return None
    try:
        return reader(path)
    except BROKEN as error:
        found.problems.append(f"{harmless(path.name)} could not be read: {sentence(error)}")
        return None


def _json(path: Path) -> dict[str, Any]:
    content = read_json(path, MAX_LIST_BYTES)
    missing = [key for key in _KEYS.get(path.name, ()) if key not in content]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return content
