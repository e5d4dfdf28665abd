"""The table of llama.cpp's files, from ``benchmarks/results/llama_cpp.json``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from seeds import change

RESULT = Path(__file__).parent / "results" / "llama_cpp.json"
NO_MATRIX, BASELINE = "none", "llama.cpp's"


def llama_files() -> str:
    """Return the KL of files of equal bytes; in brackets the paired change to llama.cpp's way."""
    runs = json.loads(RESULT.read_text())["runs"]
    columns = list(dict.fromkeys(run["matrix"] for run in runs))
    lines = [
        "| model, calibration tokens | bytes of one type | seeds | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 3) + "|",
    ]
    rows = dict.fromkeys((run["model"], run["tokens"], run["bytes_of"]) for run in runs)
    for row in rows:
        model, tokens, type_name = row
        found = {
            (run["matrix"], run["seed"]): run["kl"]
            for run in runs
            if (run["model"], run["tokens"], run["bytes_of"]) == row
        }
        seeds = sorted({seed for _, seed in found})
        cells = []
        for column in columns:
            of_seed = {seed: found[column, seed] for seed in seeds if (column, seed) in found}
            if not of_seed:
                is_refused = column == NO_MATRIX and type_name.startswith("IQ2")
                cells.append("refused" if is_refused else "")
                continue
            both = [seed for seed in of_seed if (BASELINE, seed) in found]
            pairs = [of_seed[seed] for seed in both], [found[BASELINE, seed] for seed in both]
            is_paired = len(both) > 1 and column != BASELINE
            against = f" ({change(*pairs)})" if is_paired else ""
            cells.append(f"{statistics.mean(of_seed.values()):.5f}{against}")
        text = " | ".join([f"{model}, {tokens}", type_name, str(len(seeds)), *cells])
        lines.append(f"| {text} |")
    return "\n".join(lines) + "\n"
