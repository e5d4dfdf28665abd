"""Can this checkpoint be shipped? Decided by rules that are written here and shown on the page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moeq_plugin.checkpoint.checks.findings import counted
from moeq_plugin.records.borrowing import Borrowing
from moeq_plugin.records.run import Basis
from moeq_plugin.report.directory import Findings
from moeq_plugin.report.section import percent

# shares of perplexity gained, and of a task's score that is left
_SMALL_GAIN, _LARGE_GAIN = 0.02, 0.10
_LITTLE_LOST, _MUCH_LOST = 0.98, 0.90

RULES = (
    "**do not ship**: `moeq verify` finds an error; more than half of the linears rest on tokens "
    "of others or on too few; perplexity is more than 10 % up on a text; a task has less than 90 % "
    "of its score.",
    "**look at it first**: any of these is not known; a linear was rounded to nearest; more than "
    "5 % of the linears rest on tokens of others or on too few; perplexity is more than 2 % up; a "
    "task has less than 98 %; `moeq verify` warns, or a reader is known to misread it; a file of "
    "the directory cannot be read.",
    "**ship it**: nothing of that. A number counts with two standard errors against alarm.",
)

_IN_WORDS = {
    "good": "All that was asked for was done and measured, and nothing speaks against serving it.",
    "warn": "It may be good, but not all of it is known or as it should be: read the reasons "
    "before you serve it.",
    "bad": "Something is wrong with it, or it has lost too much: quantize again before you serve "
    "it.",
}


@dataclass(frozen=True)
class Decision:
    """What to do with a checkpoint.

    Attributes:
        word: ``ship it``, ``look at it first`` or ``do not ship``.
        level: ``good``, ``warn`` or ``bad``, for the colour.
        reasons: a sentence each, the worst first; empty for ``ship it``.
    """

    word: str
    level: str
    reasons: list[str]

    @property
    def in_words(self) -> str:
        """Return what the word means for whoever wants to serve the checkpoint."""
        return _IN_WORDS[self.level]


def decide(found: Findings) -> Decision:
    """Apply the rules to what a directory says of itself."""
    bad = [*_of_verification(found, bad=True), *_of_calibration(found, bad=True)]
    bad += _of_quality(found, _LARGE_GAIN, _MUCH_LOST)
    if bad:
        return Decision("do not ship", "bad", bad)
    odd = [*_of_verification(found, bad=False), *_of_calibration(found, bad=False)]
    odd += _of_quality(found, _SMALL_GAIN, _LITTLE_LOST)
    odd += [limit for record in found.records for limit in record.limits]
    odd += found.problems
    if found.quality is None:
        odd.append("Its quality was not measured: `moeq eval`.")
    return Decision("look at it first", "warn", odd) if odd else Decision("ship it", "good", [])


def _of_verification(found: Findings, *, bad: bool) -> Iterator[str]:
    report = found.verification
    if report is None:
        if not bad:
            yield "It was not verified."
        return
    told = report.errors if bad else report.warnings
    if told:
        found_them = counted(len(told), "error" if bad else "warning")
        yield f"`moeq verify`: {found_them}, such as {told[0].where}: {told[0].what}."


def _of_calibration(found: Findings, *, bad: bool) -> Iterator[str]:
    if not found.linears:
        if not bad:
            yield "Nothing is recorded of how it was made: there is no moeq_run.json."
        return
    borrowing = Borrowing.of(found.linears)
    if borrowing.is_too_much if bad else borrowing.is_notable:
        yield borrowing.sentence()
    rounded = sum(linear.basis is Basis.NONE for linear in found.linears)
    if rounded and not bad:
        yield f"{counted(rounded, 'linear')} rounded to nearest: no token to calibrate on."


def _of_quality(found: Findings, most_gained: float, least_left: float) -> Iterator[str]:
    if found.quality is None:
        return
    for name, text in found.quality.texts.items():
        change, error = text["nll_change"], text["nll_change_stderr"] or 0.0
        if change is not None and change - 2 * error > math.log1p(most_gained):
            yield f"On {name} perplexity is {percent(math.expm1(change))} up."
    for task in found.quality.tasks:
        left = task.recovery
        error = (task.stderr or 0.0) / abs(task.reference) if task.reference else 0.0
        if left is not None and left + 2 * error < least_left:
            yield f"{task.task} has {percent(left)} of its score left."
