"""Several checkpoints side by side: what each takes, what it loses, and which to ship."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moeq_plugin.checkpoint.checks.findings import counted
from moeq_plugin.report.charts import SERIES, Chart, plot
from moeq_plugin.report.decision import Decision, decide
from moeq_plugin.report.directory import Findings
from moeq_plugin.report.section import Section, Table, number, percent, size, unit_of, with_error
from moeq_plugin.report.section_run import Verdict

_LEVELS = ("good", "warn", "bad")
_AS_SMALL = 1.01  # times the bytes of the smallest
_NOTHING = "\u2013"


def overall(several: Sequence[Findings]) -> Verdict:
    """Return what stands at the top: the smallest of those that the rules like best.

    Of several that are as small, within a hundredth, it is the one that loses least.
    """
    decisions = [decide(found) for found in several]
    best = min(_LEVELS.index(decision.level) for decision in decisions)
    able = [f for f, d in zip(several, decisions, strict=True) if _LEVELS.index(d.level) == best]
    limit = _AS_SMALL * min(map(_num_bytes, able))
    small = [found for found in able if _num_bytes(found) <= limit]
    smallest = min(small, key=_loss)
    chosen = decide(smallest)
    name = _name(smallest)
    line = f"{name} is the only one that the rules judge so."
    if len(able) > 1:
        line = f"{name} is the smallest of the {len(able)} that the rules judge so."
    if len(small) > 1 and _loss(smallest) < math.inf:
        line = f"{name} loses least of the {len(small)} smallest that the rules judge so."
    return Verdict(Decision(f"{chosen.word}: {name}", chosen.level, chosen.reasons), line, [])


def comparison_section(several: Sequence[Findings]) -> Section:
    """Return a table with a row for each checkpoint, and quality over size."""
    section = Section("comparison", "Side by side")
    decisions = [decide(found) for found in several]
    head = ["checkpoint", "decision", "size", "bits per weight", "perplexity added", "mean KL",
            "same first token", "recovery of the worst task", "verify"]  # fmt: skip
    rows = [_row(found, decision) for found, decision in zip(several, decisions, strict=True)]
    shown = [n for n in range(len(head)) if any(row[n] != _NOTHING for row in rows)]
    head, *rows = ([row[n] for n in shown] for row in (head, *rows))
    bad = frozenset(n for n, decision in enumerate(decisions) if decision.level == "bad")
    caption = "The worst text of each, \u00b1 standard error; what is not to be shipped is marked"
    section.parts.append(Table(caption, head, rows, 2, bad))
    chart = _quality_over_size(several)
    if chart is not None:
        section.parts.append(chart)
    reasons = [
        [_name(found), reason.replace("`", "")]
        for found, decision in zip(several, decisions, strict=True)
        for reason in decision.reasons
    ]
    if reasons:
        section.parts.append(Table("Why not simply ship", ["checkpoint", "reason"], reasons, 2))
    return section


def _num_bytes(found: Findings) -> int:
    return found.stored.num_bytes if found.stored else 0


def _loss(found: Findings) -> float:
    """Return the mean KL on the worst text, infinite where it was not measured."""
    quality = found.quality
    if quality is None or not quality.worst_text:
        return math.inf
    return float(quality.texts[quality.worst_text]["kl"])


def _name(found: Findings) -> str:
    return found.directory.resolve().name


def _row(found: Findings, decision: Decision) -> list[str]:
    stored, quality, report = found.stored, found.quality, found.verification
    text = quality.texts[quality.worst_text] if quality and quality.worst_text else None
    task = quality.worst_task if quality else None
    columns = ("kl", "top1_agreement")
    return [
        _name(found),
        decision.word,
        size(stored.num_bytes) if stored else _NOTHING,
        number(found.bits_per_weight, 4),
        _added(text) if text else _NOTHING,
        *(with_error(text[c], text[f"{c}_stderr"]) if text else _NOTHING for c in columns),
        f"{percent(task.recovery)} ({task.task})" if task else _NOTHING,
        f"{counted(len(report.errors), 'error')}, {counted(len(report.warnings), 'warning')}"
        if report
        else _NOTHING,
    ]


def _added(text: Mapping[str, Any]) -> str:
    """Return by how much perplexity has grown, with the error of the paired difference."""
    if text["nll_change"] is None:
        return _NOTHING
    error = 100 * (text["nll_change_stderr"] or 0)
    return f"{with_error(100 * math.expm1(text['nll_change']), error)} %"


def _place(found: Findings) -> tuple[int, Mapping[str, Any]] | None:
    """Return bytes and the numbers of the worst text, ``None`` if either is not known."""
    if found.stored and found.quality and found.quality.worst_text:
        return found.stored.num_bytes, found.quality.texts[found.quality.worst_text]
    return None


def _quality_over_size(several: Sequence[Findings]) -> Chart | None:
    """Return mean KL over bytes, ``None`` where fewer than two were measured."""
    places = [(_name(found), _place(found)) for found in several]
    known = [(name, *place) for name, place in places if place is not None]
    if len(known) < 2:
        return None
    unmeasured = [name for name, place in places if place is None]
    absent = f" Not evaluated, and so not in it: {', '.join(unmeasured)}." if unmeasured else ""
    unit, name = unit_of(max(num_bytes for _, num_bytes, _ in known))
    traces = [
        {
            "type": "scatter", "mode": "markers", "name": label,
            "x": [num_bytes / unit], "y": [text["kl"]],
            "error_y": {"type": "data", "array": [text["kl_stderr"] or 0], "thickness": 1},
            "hovertext": [f"{label}<br>{size(num_bytes)}, KL {number(text['kl'])}"],
            "hovertemplate": "%{hovertext}<extra></extra>",
            "marker": {"color": SERIES[index % len(SERIES)], "size": 11},
        }
        for index, (label, num_bytes, text) in enumerate(known)
    ]  # fmt: skip
    return plot(
        "quality-over-size",
        "Mean KL divergence from the 16-bit model on the worst text, over the size on disk; nearer "
        f"to the lower left is better.{absent}",
        traces,
        x={"title": {"text": f"size ({name})"}},
        y={"title": {"text": "mean KL (nats per token)"}, "rangemode": "tozero"},
        height=340,
    )
