"""Whether a run of ``moeq quantize`` did what was asked, from the record that it wrote."""

from __future__ import annotations

from pathlib import Path

from moeq_plugin.records.borrowing import Borrowing
from moeq_plugin.records.run import FILE_NAME, Basis, RunRecord


def health(checkpoint: Path, *, strict: bool) -> tuple[str, list[str]]:
    """Return the run in one line, and every linear or scale that is not as asked for."""
    if not (checkpoint / FILE_NAME).exists():
        return "written by modifiers of others, which keep no record", []
    records = RunRecord.load(checkpoint)
    rests_on = [
        (linear.name, linear.basis, linear.effective_tokens)
        for record in records
        for linear in record.linears
    ]
    rests_on += [
        (f"scales of {name}", Basis(of["basis"]), of["effective_tokens"])
        for record in records
        for name, of in record.smoothed.items()
    ]
    wrong = {Basis.NONE} if not strict else set(Basis) - {Basis.OWN}
    failures = [
        f"{name}: {basis.value}, {effective_tokens:.1f} effective tokens"
        for name, basis, effective_tokens in rests_on
        if basis in wrong
    ]
    return "; ".join(record.summary(len(record.linears)) for record in records), failures


def borrowing(checkpoint: Path) -> Borrowing:
    """Return how many linears of all modifiers rest on too few tokens of their own."""
    if not (checkpoint / FILE_NAME).exists():
        return Borrowing.of([])
    records = RunRecord.load(checkpoint)
    return Borrowing.of([linear for record in records for linear in record.linears])


def verdict(found: Borrowing) -> str:
    """Return what the report will say of a run that starved, empty for others."""
    if not found.is_notable:
        return ""
    if not (found.is_too_much or found.none_is_fed):
        return f"warning: {found.sentence()}"
    return (
        f"warning: {found.sentence()} This is not a checkpoint to ship; --strict makes every one "
        "of them an error"
    )


def complaint(failures: list[str], consequence: str) -> str:
    """Return the message that lists what failed, with its way out."""
    listed = "\n".join(f"  - {failure}" for failure in failures[:10])
    return (
        f"moeq quantize: {len(failures)} linears were not quantized as asked, {consequence}:\n"
        f"{listed}\nMore calibration data feeds them."
    )
