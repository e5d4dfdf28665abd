"""The tables of the ablation, from ``benchmarks/results/moequant_table.json``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import NamedTuple

from seeds import change, error

RESULT = Path(__file__).parent / "results" / "moequant_table.json"
TEXTS, POWERS = ("EBSS", "sampled"), (1.0, 2.0)
NEAREST = {"method": "RTN", "text": None, "power": None}
NATURAL = {"text": "natural text", "power": 1.0}
# name: (which cases, what they are compared with)
EFFECTS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "GPTQ for rounding to nearest": ({"method": "GPTQ", **NATURAL}, NEAREST),
    "ranges by MSE for GPTQ": ({"method": "GPTQ, ranges by MSE"}, {"method": "GPTQ"}),
    "AWQ before rounding to nearest": ({"method": "AWQ", **NATURAL}, NEAREST),
    "our AWQ for llm-compressor's": (
        {"method": "AWQ", **NATURAL},
        {"method": "AWQ, llm-compressor", "power": None},
    ),
    "clipping after AWQ": ({"method": "AWQ, clipped"}, {"method": "AWQ"}),
    "rotation before GPTQ": ({"method": "rotated GPTQ"}, {"method": "GPTQ"}),
    **{
        f"{method}: {text} for natural text": (
            {"method": method, "text": text},
            {"text": "natural text"},
        )
        for method in ("GPTQ", "AWQ")
        for text in TEXTS
    },
    **{
        f"{method}: affinity power {power:g} for 0": (
            {"method": method, "power": power},
            {"power": 0.0},
        )
        for method in ("GPTQ", "AWQ", "AWQ, clipped")
        for power in POWERS
    },
}


class Case(NamedTuple):
    """A cell of the table; it holds one number per seed."""

    model: str
    grid: str
    method: str
    text: str | None
    power: float | None


def ablation(value: str = "kl", scale: float = 1e3, digits: int = 1) -> str:
    """Return a measure for affinity powers 0 / 1 / 2, and the largest error of the three means."""
    measured = _measured(value)
    columns = list(dict.fromkeys(case[:2] for case in measured))
    lines = [
        "| rounding | text | " + " | ".join(", ".join(column) for column in columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for method, text in dict.fromkeys((case.method, case.text) for case in measured):
        cells = []
        for column in columns:
            powers = [
                seeds
                for case, seeds in measured.items()
                if (case[:2], case.method, case.text) == (column, method, text)
            ]
            means = " / ".join(f"{scale * statistics.mean(of):.{digits}f}" for of in powers)
            noise = f" ± {scale * max(map(error, powers)):.{digits}f}" if text else ""
            cells.append(means + noise)
        lines.append(f"| {method} | {text or ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def effects() -> str:
    """Return what each ingredient changes of the KL: over cases of one seed, then over seeds."""
    measured = _measured("kl")
    columns = list(dict.fromkeys(case[:2] for case in measured))
    lines = [
        "| change of KL | " + " | ".join(", ".join(column) for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, (where, instead) in EFFECTS.items():
        cells = []
        for column in columns:
            pairs = [
                (seeds, measured[case._replace(**instead)])
                for case, seeds in measured.items()
                if case[:2] == column and where.items() <= case._asdict().items()
            ]
            ratios = [
                [a / b for a, b in zip(ours, base * (len(ours) // len(base)), strict=True)]
                for ours, base in pairs  # rounding to nearest knows no seed
            ]
            by_seed = [statistics.mean(of) for of in zip(*ratios, strict=True)]
            cells.append(change(by_seed, [1.0] * len(by_seed)))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _measured(value: str) -> dict[Case, list[float]]:
    runs = json.loads(RESULT.read_text())["runs"]
    measured: dict[Case, list[float]] = {}
    for run in sorted(runs, key=lambda run: run["seed"] or 0):
        case = Case(*(run[name] for name in Case._fields))
        measured.setdefault(case, []).append(run[value])
    return measured
