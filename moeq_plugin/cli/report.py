"""``moeq report``: one page that says what a checkpoint is like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeq_plugin.cli.shared import app, errors, say

if TYPE_CHECKING:
    from moeq_plugin.report.directory import Findings

_NUM_BUDGETS = 14


@app.command()
def report(
    checkpoint: Annotated[Path, typer.Argument(help="directory of a quantized model")],
    out: Annotated[
        Path | None, typer.Option(help="page to write; default: report.html in the directory")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="of `moeq eval --json`, if it is not in the directory")
    ] = None,
    card: Annotated[
        Path | None, typer.Option(help="also write a model card with what was measured")
    ] = None,
) -> None:
    """Write one HTML file with everything that is known of a checkpoint; it needs no network.

    Raises:
        typer.Exit: with code 2 if the request cannot be met.
    """
    from moeq_plugin.report.directory import read_directory
    from moeq_plugin.report.model_card import model_card

    with errors("report"):
        from moeq_plugin.files.atomic import write_text
        from moeq_plugin.files.places import check_new_file, check_places

        path = checkpoint / "report.html" if out is None else out
        check_places(reads={"--evaluation": evaluation}, makes={"--out": path, "--card": card})
        check_new_file("--out", path, _is_page)
        check_new_file("--card", card, lambda card: card.suffix == ".md")
        found = read_directory(checkpoint, evaluation=evaluation)
        found.front = _front(found)
        page = _rendered(found)
        write_text(path, page)
        say(f"{path}: written, {len(page) / 1e6:.1f} MB")
        if card is not None:
            write_text(card, model_card(found))
            say(f"{card}: written")
        for problem in found.problems:
            say(f"warning: {problem}", err=True)


def _is_page(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return "quantization report</title>" in file.read(4096)


def _rendered(found: Findings) -> str:
    from moeq_plugin.report.page import render

    try:
        return render(found)
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
