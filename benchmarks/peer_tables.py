"""The tables of the comparison with other quantizers, from ``benchmarks/results/peers.json``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from seeds import change, error

RESULT = Path(__file__).parent / "results" / "peers.json"
BASELINE = "llm-compressor GPTQ"
HEADLINE = ("ours, fast", "ours, balanced", "ours, best", "AutoRound")
HEADLINE_GRIDS = ("W4 g128", "W3 g128", "W2 g64")

T = TypeVar("T")


class Cell(NamedTuple):
    """What a contender did on a grid of a model, seed by seed."""

    model: str
    grid: str
    contender: str


Seeds = Mapping[int, Mapping[str, Any]]


def measured() -> dict[Cell, Seeds]:
    """Return all runs, failed ones included."""
    found: dict[Cell, dict[int, Mapping[str, Any]]] = {}
    for run in json.loads(RESULT.read_text())["runs"]:
        cell = Cell(*(run[name] for name in Cell._fields))
        found.setdefault(cell, {})[run["seed"]] = run
    return found


def losses() -> str:
    """Return KL to the 16-bit model, its change against the baseline, and why there is none."""
    found = measured()
    lines: list[str] = []
    for model in _unique(cell.model for cell in found):
        grids, contenders = _grids(found, model), _contenders(found, model)
        lines += [f"| {model}: KL | " + " | ".join(grids) + " |", "|---" * (len(grids) + 1) + "|"]
        for contender in contenders:
            cells = [_loss(found, Cell(model, grid, contender)) for grid in grids]
            lines.append(f"| {contender} | " + " | ".join(cells) + " |")
        lines.append("")
        for reason, cells in _failures(found, model).items():
            lines.append(f"Failed, {', '.join(cells)}: {reason}\n")
    return "\n".join(lines)


def headline() -> str:
    """Return the changes of KL in percent, and times the CPU time, against the baseline."""
    found = measured()
    columns = _unique((cell.model, cell.grid) for cell in found if cell.grid in HEADLINE_GRIDS)
    heads = [*(f"{model}, {grid}" for model, grid in columns), "CPU time / GPTQ's"]
    lines = ["| change of KL, % | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in HEADLINE:
        of_name = [Cell(model, grid, name) for model, grid in columns]
        cells = [_changes(found, cell) for cell in of_name]
        cells.append(_range([ratio for cell in of_name for ratio in _ratios(found, cell)]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _changes(found: Mapping[Cell, Seeds], cell: Cell) -> str:
    changes = [100 * (ours / theirs - 1) for ours, theirs in _pairs(found, cell)]
    noise = f" ± {error(changes):.1f}" if len(changes) > 1 else ""
    return f"{statistics.mean(changes):+.1f}{noise}" if changes else ""


def _ratios(found: Mapping[Cell, Seeds], cell: Cell) -> list[float]:
    """Return CPU time over that of the baseline, of the seeds that have both."""
    base = found.get(cell._replace(contender=BASELINE), {})
    runs = found.get(cell, {}).items()
    return [
        run["cpu_s"] / base[seed]["cpu_s"]
        for seed, run in runs
        if "cpu_s" in run and "cpu_s" in base.get(seed, {})
    ]


def _range(values: Sequence[float]) -> str:
    """Return the least and the largest to two digits, one number if they are the same."""
    ends = [f"{float(f'{end:.2g}'):g}" for end in (min(values), max(values))] if values else []
    return " to ".join(_unique(ends))


def _pairs(found: Mapping[Cell, Seeds], cell: Cell) -> list[tuple[float, float]]:
    """Return KL beside that of the baseline, of the seeds that have both."""
    base = found.get(cell._replace(contender=BASELINE), {})
    seeds = found.get(cell, {})
    return [(r["kl"], base[s]["kl"]) for s, r in seeds.items() if "kl" in r and s in base]


def costs() -> str:
    """Return perplexity per grid, CPU seconds over all runs of a model, and peaks of memory."""
    found = measured()
    lines: list[str] = []
    for model in _unique(cell.model for cell in found):
        grids = _grids(found, model)
        heads = [*(f"perplexity, {g}" for g in grids), "CPU s", "times", "MiB", "MiB above loading"]
        lines += [f"| {model} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for contender in _contenders(found, model):
            of_grid = {g: found.get(Cell(model, g, contender), {}) for g in grids}
            cells = [_mean(_good(seeds), "perplexity", ".2f") for seeds in of_grid.values()]
            runs = [run for seeds in of_grid.values() for run in _good(seeds)]
            of_name = (Cell(model, grid, contender) for grid in grids)
            ratios = [ratio for cell in of_name for ratio in _ratios(found, cell)]
            cells.append(_median(runs, "cpu_s", ".1f"))
            cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
            cells += [_median(runs, key, ".0f") for key in ("peak_mib", "peak_mib_above_loading")]
            lines.append(f"| {contender} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _loss(found: Mapping[Cell, Seeds], cell: Cell) -> str:
    seeds = found.get(cell, {})
    if not seeds:
        return ""
    if not (good := _good(seeds)):
        return "failed"
    values = [run["kl"] for run in good]
    noise = f" ± {error(values):.4f}" if len(values) > 1 else ""
    text = f"{statistics.mean(values):.4f}{noise}"
    pairs = _pairs(found, cell)
    if cell.contender == BASELINE or not pairs:
        return text
    if len(pairs) == 1:
        return f"{text} ({100 * (pairs[0][0] / pairs[0][1] - 1):+.1f} %)"
    return f"{text} ({change(*zip(*pairs, strict=True))})"


def _failures(found: Mapping[Cell, Seeds], model: str) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for cell, seeds in found.items():
        for run in seeds.values():
            if cell.model == model and "error" in run:
                reasons.setdefault(run["error"], []).append(f"{cell.contender} {cell.grid}")
    return reasons


def _good(seeds: Seeds) -> list[Mapping[str, Any]]:
    return [run for run in seeds.values() if "kl" in run]


def _grids(found: Iterable[Cell], model: str) -> list[str]:
    return _unique(cell.grid for cell in found if cell.model == model)


def _contenders(found: Iterable[Cell], model: str) -> list[str]:
    return _unique(cell.contender for cell in found if cell.model == model)


def _unique(names: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(names))


def _mean(runs: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    return f"{statistics.mean(run[key] for run in runs):{form}}" if runs else ""


def _median(runs: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    return f"{statistics.median(run[key] for run in runs):{form}}" if runs else ""
