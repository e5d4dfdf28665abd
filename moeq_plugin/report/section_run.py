"""The head of the report, what the run was made with, and sample texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moeq_plugin.checkpoint.serving_memory import cache_bytes_per_token
from moeq_plugin.records.run import Basis
from moeq_plugin.report.decision import RULES, Decision, decide
from moeq_plugin.report.directory import Findings
from moeq_plugin.report.section import Section, Table, number, percent, size

_CONTEXT = 8192  # tokens in all requests together


@dataclass(frozen=True)
class Verdict:
    """Whether a reader may rest.

    Attributes:
        decision: what to do with the checkpoint, and why.
        line: the run's own line.
        tiles: (label, value) of the numbers that matter.
        rules: that decided.
    """

    decision: Decision
    line: str
    tiles: list[tuple[str, str]]
    rules: Sequence[str] = RULES


def verdict(found: Findings) -> Verdict:
    """Return what stands at the top of the page."""
    line = ". ".join(record.summary(len(record.linears)) for record in found.records)
    return Verdict(decide(found), line and f"{line[0].upper()}{line[1:]}.", list(_tiles(found)))


def _tiles(found: Findings) -> Iterator[tuple[str, str]]:
    if found.linears:
        yield "linears quantized", str(len(found.linears))
        weak = sum(linear.basis is not Basis.OWN for linear in found.linears)
        yield "not on enough tokens of their own", str(weak)
    if found.bits_per_weight is not None:
        yield "true bits per quantized weight", f"{found.bits_per_weight:.3f}"
    if found.stored is not None:
        before = size(2 * found.stored.num_weights)
        yield f"on disk ({before} in 16 bit)", size(found.stored.num_bytes)
        cache = cache_bytes_per_token(found.config)
        if cache is not None:
            label = f"to serve: weights and the cache of {_CONTEXT:,} tokens"
            yield label, size(found.stored.num_bytes + _CONTEXT * cache)
    if found.verification is not None:
        errors, warnings = found.verification.errors, found.verification.warnings
        yield "errors and warnings of moeq verify", f"{len(errors)} / {len(warnings)}"
    if found.quality is not None and found.quality.worst_text is not None:
        text = found.quality.texts[found.quality.worst_text]
        yield "mean KL, nats per token", number(text["kl"], 3)
    if found.quality is not None and found.quality.worst_task is not None:
        task = found.quality.worst_task
        yield f"recovery of the worst task ({task.task})", percent(task.recovery)


def run_section(found: Findings) -> Section:
    """Return the section on how the checkpoint was made."""
    section = Section("environment", "Environment and settings")
    versions = {k: v for record in found.records for k, v in record.versions.items()}
    if found.quality is not None:
        measured = found.quality.versions.items()
        versions |= {f"{k} (moeq eval)": v for k, v in measured if versions.get(k) != v}
    facts = [["model", found.model or "not recorded"]]
    facts += [["architecture", ", ".join(found.config.get("architectures") or ["not recorded"])]]
    for record in found.records:
        facts += [[key, value] for key, value in record.run.items()]
        facts += [["calibration", record.calibration]] if record.calibration else []
    section.parts.append(Table("Made from", ["", ""], facts, 2))
    if versions:
        rows = [[package, of] for package, of in versions.items()]
        section.parts.append(Table("Versions", ["package", "version"], rows, 2))
    for record in found.records:
        rows = [[k, _plain(v)] for k, v in record.settings.items() if v not in (None, [], {})]
        section.parts.append(Table(f"Settings of {record.modifier}", ["argument", "value"],
                                    rows, 2))  # fmt: skip
    kept = [[name, why] for record in found.records for name, why in record.kept.items()]
    if kept:
        section.parts.append(Table("Kept in 16 bit", ["module", "why"], kept, 2))
    return section


def samples_section(found: Findings) -> Section:
    """Return the section on texts: what was calibrated on, what both models write."""
    section = Section("samples", "Sample texts")
    continuations = found.quality.continuations if found.quality is not None else []
    for continuation in continuations:
        prompt = continuation.prompt
        section.quotes += [
            ("the original goes on after ▸", f"{prompt} ▸ {continuation.reference}"),
            ("the quantized model goes on after ▸", f"{prompt} ▸ {continuation.quantized}"),
        ]
    for report in [record.sampling for record in found.records if record.sampling is not None]:
        section.notes += [f"Calibration text: {report.summary()}.", *report.warnings]
        section.quotes += [("written by the model for calibration", t) for t in report.samples]
    if not section.quotes:
        section.missing.append(
            "No texts: `moeq eval` notes how both models go on from a few beginnings."
        )
    return section


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
