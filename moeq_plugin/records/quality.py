"""What was measured after quantizing, ``moeq_eval.json``: distances on texts, scores of tasks.

Standard library only. A reader checks ``schema_version``: it rises when a field changes meaning.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moeq_plugin.untrusted.broken import BROKEN, sentence
from moeq_plugin.untrusted.reading import MAX_LIST_BYTES, read_json
from moeq_plugin.untrusted.typed import build

SCHEMA_VERSION = 1
FILE_NAME = "moeq_eval.json"


@dataclass(frozen=True)
class TaskScore:
    """One task of lm-eval, before and after.

    Attributes:
        task: its name.
        metric: which of its metrics.
        higher_is_better: whether more is better.
        reference: score of the model before quantization.
        reference_stderr: its standard error, ``None`` where the task gives none.
        score: of the quantized model.
        stderr: its standard error.
    """

    task: str
    metric: str
    higher_is_better: bool
    reference: float
    reference_stderr: float | None
    score: float
    stderr: float | None

    @property
    def recovery(self) -> float | None:
        """Return how much of the score is left, 1 for all of it; ``None`` if there was none."""
        over, under = (
            (self.score, self.reference) if self.higher_is_better else (self.reference, self.score)
        )
        return over / under if under else None


@dataclass(frozen=True)
class Continuation:
    """What both models write after the same words, greedily."""

    prompt: str
    reference: str
    quantized: str


@dataclass
class QualityRecord:
    """Everything that one ``moeq eval`` measured.

    Attributes:
        reference: name or path of the model before quantization.
        quantized: of the quantized model.
        settings: sequence length, number of sequences and the like.
        versions: of the libraries that took part.
        texts: name of a text to the fields of :class:`moeq_plugin.models.evaluation.Evaluation`.
        tasks: one per task.
        continuations: a few.
    """

    reference: str
    quantized: str
    settings: dict[str, Any]
    versions: dict[str, str]
    texts: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: list[TaskScore] = field(default_factory=list)
    continuations: list[Continuation] = field(default_factory=list)

    @property
    def worst_text(self) -> str | None:
        """Return the name of the text with the largest mean KL."""
        return max(self.texts, key=lambda name: self.texts[name]["kl"], default=None)

    @property
    def worst_task(self) -> TaskScore | None:
        """Return the task that keeps least of its score."""
        known = [task for task in self.tasks if task.recovery is not None]
        return min(known, key=lambda task: task.recovery or 0.0, default=None)

    def save(self, path: Path) -> None:
        """Write JSON; what is not a number becomes null."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        path.write_text(json.dumps(_finite(content), allow_nan=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> QualityRecord:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is not such a record.
        """
        try:
            content = read_json(path, MAX_LIST_BYTES)
            version = content.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise ValueError(f"schema version {ascii(version)}, expected {SCHEMA_VERSION}")
            return build(cls, content)
        except BROKEN as error:
            raise ValueError(f"{path} is not a record of `moeq eval`: {sentence(error)}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
