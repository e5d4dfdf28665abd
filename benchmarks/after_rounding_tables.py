"""What may be done beside rounding and after it, from three of ``benchmarks/results``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from seeds import error

RESULTS = Path(__file__).parent / "results"
Runs = Sequence[Mapping[str, Any]]


def router_refit() -> str:
    """Return KL before, its paired change, and the agreement of routers before and after."""
    runs = json.loads((RESULTS / "router_refit.json").read_text())["runs"]
    lines = ["| model | grid | KL before | change | same experts before | after | seeds |"]
    lines += ["|---" * 7 + "|"]
    for case, found in _by(runs, "model", "grid").items():
        before, after = (
            f"{100 * statistics.mean(run[f'routing_agreement_{when}'] for run in found):.2f} %"
            for when in ("before", "after")
        )
        lines.append(_line(*case, *_changed(found), before, after, len(found)))
    return "\n".join(lines) + "\n"


def block_reconstruction() -> str:
    """Return KL before, its paired change, and CPU time in times that of the run before it."""
    runs = json.loads((RESULTS / "block_reconstruction.json").read_text())["runs"]
    lines = ["| model | iterations | grid | KL before | change | CPU of learning | seeds |"]
    lines += ["|---" * 7 + "|"]
    for case, found in _by(runs, "model", "iterations", "grid").items():
        times = statistics.median(run["learning_cpu_s"] / run["cpu_s"] for run in found)
        lines.append(_line(*case, *_changed(found), f"{times:.0f}x", len(found)))
    return "\n".join(lines) + "\n"


def gradient_damping() -> str:
    """Return the change of KL against ``balanced``, by damping and model."""
    runs = json.loads((RESULTS / "gradient_damping.json").read_text())["runs"]
    kl = {(run["model"], run["damping"]): run["kl"] for run in runs}
    dampings = [damping for damping in dict.fromkeys(run["damping"] for run in runs) if damping]
    lines = ["| model | KL of `balanced` | " + " | ".join(map(str, dampings)) + " |"]
    lines += ["|---" * (len(dampings) + 2) + "|"]
    for model in dict.fromkeys(run["model"] for run in runs):
        base = kl[model, None]
        changes = [f"{100 * (kl[model, damping] / base - 1):+.1f} %" for damping in dampings]
        lines.append(_line(model, f"{base:.4f}", *changes))
    return "\n".join(lines) + "\n"


def _by(runs: Runs, *names: str) -> dict[tuple[Any, ...], Runs]:
    cases = dict.fromkeys(tuple(run[name] for name in names) for run in runs)
    return {case: [r for r in runs if tuple(r[n] for n in names) == case] for case in cases}


def _changed(runs: Runs) -> tuple[str, str]:
    changes = [100 * (run["kl_after"] / run["kl_before"] - 1) for run in runs]
    noise = f" ± {error(changes):.1f}" if len(changes) > 1 else ""
    mean = statistics.mean(run["kl_before"] for run in runs)
    return f"{mean:.4f}", f"{statistics.mean(changes):+.1f}{noise} %"


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
