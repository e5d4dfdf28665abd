"""The model card, ``README.md`` beside the weights: what was done and what a reader has to know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from moeq_plugin.report.record import RunRecord

FILE_NAME = "README.md"


def model_card(records: Sequence[RunRecord]) -> str:
    """Return Markdown: schemes, health of the run, limits and versions.

    Args:
        records: one per modifier that took part.
    """
    lines = ["# Quantized model", ""]
    for record in records:
        schemes = Counter(linear.scheme for linear in record.linears)
        lines += [f"Made with `{record.modifier}` of moeq-plugin {record.versions['moeq-plugin']}."]
        lines += ["", "| linears | scheme |", "|---|---|"]
        lines += [f"| {count} | {scheme} |" for scheme, count in sorted(schemes.items())]
        lines += ["", record.summary(len(record.linears)) + ".", ""]
    limits = list(dict.fromkeys(limit for record in records for limit in record.limits))
    lines += ["## Before you load it", ""]
    lines += [f"- {limit}" for limit in limits] or ["Nothing is known that would misread it."]
    versions = {package: v for record in records for package, v in record.versions.items()}
    lines += ["", "## Made with", ""]
    lines += [f"- {package} {number}" for package, number in versions.items()]
    lines += ["", "Every linear, its effective tokens and its loss: `moeq_run.json`.", ""]
    return "\n".join(lines)


def save_model_card(records: Sequence[RunRecord], directory: Path) -> None:
    """Write the card, unless there is one already."""
    path = directory / FILE_NAME
    if not path.exists():
        path.write_text(model_card(records))
