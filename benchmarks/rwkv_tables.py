"""The tables of RWKV's page, from ``benchmarks/results/rwkv.json``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from seeds import change

RESULT = Path(__file__).parent / "results" / "rwkv.json"
BASELINES = {
    "choice": "GPTQ, searched ranges",
    "formats": "W3 group 64, balanced",
    "elementwise": "one codebook for all",
    "rules": "proxy, one of ten in a codebook",
}
Runs = list[dict[str, Any]]


def choice() -> str:
    """Return ways to choose formats under a budget."""
    return _table("choice")


def formats() -> str:
    """Return all weights in one format."""
    return _table("formats")


def elementwise() -> str:
    """Return element-wise weights in codebooks, against the same without."""
    return _table("elementwise")


def rules() -> str:
    """Return rules that look at no data, against the paper's proxy."""
    return _table("rules")


def _table(name: str) -> str:
    runs = json.loads(RESULT.read_text())["runs"]
    if not any(run["table"] == name for run in runs):
        return "Not measured since the defaults changed: `python benchmarks/rwkv.py` does it.\n"
    lines = ["| | bits | in codebooks | KL to 16 bit | change | perplexity |", "|---" * 6 + "|"]
    for budget in dict.fromkeys(run["budget"] for run in runs if run["table"] == name):
        base = _of(runs, name, budget, BASELINES[name]) or _of(
            runs, "choice", budget, BASELINES[name]
        )
        for method in dict.fromkeys(
            run["method"] for run in runs if (run["table"], run["budget"]) == (name, budget)
        ):
            lines.append(_row(method, _of(runs, name, budget, method), base))
        if name not in {"choice", "formats"}:
            lines.insert(2, _row(BASELINES[name], base, base))
    return "\n".join(lines) + "\n"


def _of(runs: Runs, table: str, budget: str, method: str) -> Runs:
    wanted = (table, budget, method)
    found = [run for run in runs if (run["table"], run["budget"], run["method"]) == wanted]
    return sorted(found, key=lambda run: int(run["seed"]))


def _row(method: str, runs: Runs, base: Runs) -> str:
    mean = {
        key: statistics.mean(run[key] for run in runs)
        for key in ("bits_per_weight", "num_codebook", "kl", "perplexity")
    }
    changed = ""
    if runs != base:
        seeds = {run["seed"] for run in runs}
        changed = change(
            [run["kl"] for run in runs], [run["kl"] for run in base if run["seed"] in seeds]
        )
    return (
        f"| {method} | {mean['bits_per_weight']:.3f} | {mean['num_codebook']:.0f} "
        f"| {mean['kl']:.5f} | {changed} | {mean['perplexity']:.2f} |"
    )
