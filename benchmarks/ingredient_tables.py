"""The table of the solver's ingredients, from ``benchmarks/results/ingredients.json``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from seeds import error

RESULT = Path(__file__).parent / "results" / "ingredients.json"
BASELINE = "default"


def ingredients() -> str:
    """Return the paired changes of KL by contender, and CPU time relative to the default."""
    runs = json.loads(RESULT.read_text())["runs"]
    found = {(r["model"], r["grid"], r["contender"], r["seed"]): r for r in runs}
    columns = sorted({(r["model"], r["grid"]) for r in runs}, reverse=True)
    models = list(dict.fromkeys(model for model, _ in columns))
    contenders = list(dict.fromkeys(r["contender"] for r in runs))  # the first case has all
    heads = [f"{model}, {grid}" for model, grid in columns]
    times = [f"CPU, {model}" for model in models]
    lines = [
        "| change of KL, % | " + " | ".join([*heads, *times]) + " |",
        "|---" * (len(columns) + len(models) + 1) + "|",
    ]

    def seeds_of(model: str, grid: str, contender: str) -> list[int]:
        return sorted(s for *of, s in found if of == [model, grid, contender])

    def ratios(model: str, grid: str, contender: str, value: str) -> list[float]:
        return [
            found[model, grid, contender, s][value] / found[model, grid, BASELINE, s][value]
            for s in seeds_of(model, grid, contender)
        ]

    for contender in contenders:
        cells = []
        for column in columns:
            if contender == BASELINE:
                kl = [found[*column, contender, s]["kl"] for s in seeds_of(*column, contender)]
                cells.append(f"KL {statistics.mean(kl):.4f}")
                continue
            changes = [100 * (of - 1) for of in ratios(*column, contender, "kl")]
            noise = f" ± {error(changes):.1f}" if len(changes) > 1 else ""
            cells.append(f"{statistics.mean(changes):+.1f}{noise}" if changes else "")
        for model in models:
            of_model = [
                ratio
                for of, grid in columns
                if of == model
                for ratio in ratios(model, grid, contender, "cpu_s")
            ]
            cells.append(f"{statistics.median(of_model):.2f}x" if of_model else "")
        lines.append(f"| {contender} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
