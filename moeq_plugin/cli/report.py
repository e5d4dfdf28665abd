"""``moeq report``: one page that says what a checkpoint is like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeq_plugin.cli.named_model import check_checkpoint
from moeq_plugin.cli.shared import app, errors, say

if TYPE_CHECKING:
    from moeq_plugin.report.directory import Findings

_NUM_BUDGETS = 14


@app.command()
def report(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="directory of a quantized model; several are compared")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="page to write; default: report.html in the directory, for several "
            "comparison.html here"
        ),
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="of `moeq eval --json`, if it is not in the directory")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="also write a model card with what was measured")
    ] = None,
) -> None:
    """Write one HTML file that says whether to ship a checkpoint, and why; it needs no network.

    Raises:
        typer.Exit: with code 2 if the request cannot be met.
    """
    with errors("report"):
        from moeq_plugin.files.atomic import write_text
        from moeq_plugin.files.places import check_new_file, check_places
        from moeq_plugin.report.model_card import model_card

        for checkpoint in checkpoints:
            check_checkpoint(checkpoint)
        path = _place(checkpoints, out, of_one=evaluation or card)
        check_places(reads={"--evaluation": evaluation}, makes={"--out": path, "--card": card})
        check_new_file("--out", path, _is_page)
        check_new_file("--card", card, lambda card: card.suffix == ".md")
        several = [_findings(checkpoint, evaluation) for checkpoint in checkpoints]
        _check_quantized(several, has_place=out is not None or len(several) > 1)
        page = _rendered(several)
        write_text(path, page)
        say(f"{path}: written, {len(page) / 1e6:.1f} MB")
        if card is not None:
            write_text(card, model_card(several[0]))
            say(f"{card}: written")
        for problem in (problem for found in several for problem in found.problems):
            say(f"warning: {problem}", err=True)


def _place(checkpoints: list[Path], out: Path | None, *, of_one: Path | None) -> Path:
    """Return where the page goes.

    Raises:
        ValueError: if there are several checkpoints, and something that only one can have.
    """
    if len(checkpoints) > 1 and of_one is not None:
        raise ValueError("--evaluation and --card are of one checkpoint, several were given")
    if out is not None:
        return out
    return checkpoints[0] / "report.html" if len(checkpoints) == 1 else Path("comparison.html")


def _check_quantized(several: list[Findings], *, has_place: bool) -> None:
    """Keep the directory of a model that is not quantized as it is.

    Raises:
        ValueError: saying how to get the page.
    """
    if not has_place and not several[0].is_quantized:
        raise ValueError(
            f"{several[0].directory} is not quantized; --out FILE writes a page about it elsewhere"
        )


def _findings(checkpoint: Path, evaluation: Path | None) -> Findings:
    """Return all that is known of a checkpoint, every weight looked at."""
    from moeq_plugin import verify_checkpoint
    from moeq_plugin.report.directory import read_directory

    found = read_directory(checkpoint, evaluation=evaluation)
    found.front = _front(found)
    if found.stored is not None:
        try:
            found.verification = verify_checkpoint(checkpoint)
        except ValueError as error:
            found.problems.append(f"it could not be verified: {error}")
    return found


def _is_page(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return "quantization report</title>" in file.read(4096)


def _rendered(several: list[Findings]) -> str:
    from moeq_plugin.report.page import render, render_comparison

    try:
        return render(several[0]) if len(several) == 1 else render_comparison(several)
    except ImportError as error:  # the message names what to install
        raise ValueError(error) from None


def _front(found: Findings) -> list[dict[str, Any]]:
    """Return optima from the smallest to the largest size that the table's options allow."""
    from collections import Counter

    from moeq_plugin.core.allocation import BitBudget, achievable_bytes, pareto_front
    from moeq_plugin.core.sensitivity import SensitivityTable
    from moeq_plugin.report.directory import SENSITIVITY_FILE

    if found.table is None:
        return []
    target = "vllm" if found.allocation is None else found.allocation["target"]
    try:
        table = SensitivityTable.load(found.directory / SENSITIVITY_FILE)
        low, high = achievable_bytes(table, target=target)
    except ValueError as error:
        found.problems.append(str(error))
        found.table = None
        return []
    weights = int(table.num_weights.sum())
    steps = [low + (high - low) * step // (_NUM_BUDGETS - 1) for step in range(_NUM_BUDGETS)]
    budgets = [BitBudget(bits_per_weight=8 * size / weights) for size in steps]
    return [
        {
            "num_bytes": best.num_bytes + table.fixed_bytes,
            "bits_per_weight": best.bits_per_weight,
            "loss": best.value,
            "counts": dict(Counter(best.choice.values())),
        }
        for best in pareto_front(table, budgets, target=target)
        if best.value > 0
    ]
