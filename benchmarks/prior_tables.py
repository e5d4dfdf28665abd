"""The table of priors, from ``benchmarks/results/few_tokens.json``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from seeds import error

RESULT = Path(__file__).parent / "results" / "few_tokens.json"


def few_tokens() -> str:
    """Return the paired changes of KL by prior, for each number of sequences, model and grid."""
    runs = json.loads(RESULT.read_text())["runs"]
    names = ("model", "grid", "sequences", "prior_tokens", "seed")
    kl = {tuple(run[name] for name in names): run["kl"] for run in runs}
    priors = sorted({run["prior_tokens"] for run in runs} - {0.0})
    heads = [f"prior {prior}" for prior in priors]
    lines = ["| sequences | model | grid | KL without | " + " | ".join(heads) + " | seeds |"]
    lines += ["|---" * (len(heads) + 5) + "|"]
    for sequences, model, grid in dict.fromkeys(
        (r["sequences"], r["model"], r["grid"]) for r in runs
    ):
        case = (model, grid, sequences)
        seeds = sorted(s for *of, prior, s in kl if tuple(of) == case and prior == 0)
        cells = [f"{statistics.mean(kl[*case, 0.0, s] for s in seeds):.4f}"]
        for prior in priors:
            changes = [
                100 * (kl[*case, prior, s] / kl[*case, 0.0, s] - 1)
                for s in seeds
                if (*case, prior, s) in kl
            ]
            noise = f" ± {error(changes):.1f}" if len(changes) > 1 else ""
            cells.append(f"{statistics.mean(changes):+.1f} %{noise}" if changes else "")
        row = [str(sequences), model, grid, *cells, str(len(seeds))]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"
