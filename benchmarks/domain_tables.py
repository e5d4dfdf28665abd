"""The table of calibration sets, from ``benchmarks/results/domains.json``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from seeds import error

RESULT = Path(__file__).parent / "results" / "domains.json"


def calibration_sets() -> str:
    """Return KL on each kind of held-out text by what was calibrated on, a table for each model."""
    runs = json.loads(RESULT.read_text())["runs"]
    lines = []
    for model in dict.fromkeys(run["model"] for run in runs):
        of_model = [run for run in runs if run["model"] == model]
        kinds = list(of_model[0]["kl"])
        heads = [*kinds, "mean", "worst", "nats a token of the set", "seeds"]
        lines += [f"| {model}, calibrated on | " + " | ".join(heads) + " |"]
        lines += ["|---" * (len(heads) + 1) + "|"]
        for name in dict.fromkeys(run["set"] for run in of_model):
            seeds = [run for run in of_model if run["set"] == name]
            cells = [f"{statistics.mean(run['kl'][kind] for run in seeds):.4f}" for kind in kinds]
            for value in ("mean", "worst"):
                values = [run[value] for run in seeds]
                noise = f" ± {error(values):.4f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.4f}{noise}")
            cells.append(f"{statistics.mean(run['nll_of_set'] for run in seeds):.2f}")
            lines.append(f"| {name} | " + " | ".join([*cells, str(len(seeds))]) + " |")
        lines.append("")
    return "\n".join(lines)
