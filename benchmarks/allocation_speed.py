"""CPU seconds and certified gap of the exact knapsack, against HiGHS on the same instance.

    OMP_NUM_THREADS=1 python benchmarks/allocation_speed.py

Synthetic tables of the sizes that real models give: losses are log-normal over groups (sigma 2.5),
fall by 4 per bit and scatter by 15% around that; bytes are packed weights plus 16-bit scales of
groups of 128, of one shape ("one shape"), of five shapes as in a mixed stack ("few shapes"), or
without any common divisor ("any size", which no checkpoint has). Five budgets, three seeds.
HiGHS runs once per size, on "few shapes"; null where it was not done after a minute by the clock.
Writes ``benchmarks/results/allocation_speed.json``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from scipy import optimize, sparse

from moeq_plugin.core.allocation import BitBudget, allocate_bits
from moeq_plugin.core.sensitivity import SensitivityTable

RESULT = Path(__file__).parent / "results" / "allocation_speed.json"
SIZES = {
    "48 layers x 6": (48, 6),
    "1024 experts x 3": (1024, 3),
    "1664 experts x 4": (1664, 4),
    "6144 experts x 4": (6144, 4),
    "12288 linears x 4": (12288, 4),
    "30720 experts x 4": (30720, 4),
}
SHAPES = ("one shape", "few shapes", "any size")
BUDGETS = (0.05, 0.25, 0.5, 0.75, 0.95)  # between the smallest and the largest options
SEEDS = (0, 1, 2)
HIGHS_SECONDS = 60

T = TypeVar("T")


def main() -> None:
    results = {}
    for name, (groups, options) in SIZES.items():
        results[name] = {shapes: measure(groups, options, shapes) for shapes in SHAPES}
        results[name]["HiGHS, few shapes, half"] = compare(groups, options)
        print(name, json.dumps(results[name], indent=1), flush=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")


def measure(groups: int, options: int, shapes: str) -> dict[str, float]:
    """Return times and the worst gap over budgets and seeds."""
    seconds, gaps = [], []
    for seed in SEEDS:
        table = make_table(groups, options, shapes, seed)
        for share in BUDGETS:
            allocation, took = timed(lambda t=table, s=share: allocate_bits(t, budget(t, s)))
            seconds.append(took)
            gaps.append(allocation.gap)
    return {
        "median_cpu_s": statistics.median(seconds),
        "max_cpu_s": max(seconds),
        "worst_gap": max(gaps),
    }


def compare(groups: int, options: int) -> dict[str, float | None]:
    """Return HiGHS's time and by how much its value exceeds ours, relative."""
    table = make_table(groups, options, "few shapes", 0)
    ours = allocate_bits(table, budget(table, 0.5))
    theirs, took = timed(lambda: solve_with_highs(table, ours.limit_bytes))
    if theirs is None:
        return {"cpu_s": None, "excess": None}
    return {"cpu_s": took, "excess": theirs / ours.value - 1}


def make_table(groups: int, options: int, shapes: str, seed: int) -> SensitivityTable:
    rng = np.random.default_rng(seed)
    bits = np.array([2, 3, 4, 5, 6, 8])[:options]
    weights = {
        "one shape": np.full(groups, 3 * 2048 * 768),
        "few shapes": rng.choice(
            [2048 * 768, 2048 * 1536, 4096 * 2048, 512 * 2048, 2048 * 11008], groups
        ),
        "any size": rng.integers(10**5, 10**8, groups),
    }[shapes]
    num_bytes = np.round(weights[:, None] * (bits + 16 / 128) / 8).astype(np.int64)
    if shapes == "any size":
        num_bytes += rng.integers(0, 1000, num_bytes.shape)
    loss = 1e-9 * np.exp(rng.normal(0, 2.5, groups))[:, None] * weights[:, None] * 4.0**-bits
    names = tuple(str(g) for g in range(groups))
    return SensitivityTable(
        rows=names,
        options=tuple(f"w{b}" for b in bits),
        domains=("text",),
        loss=(loss * np.exp(rng.normal(0, 0.15, loss.shape)))[None],
        num_bytes=num_bytes,
        num_weights=weights,
        units={"vllm": names},
    )


def budget(table: SensitivityTable, share: float) -> BitBudget:
    low, high = table.num_bytes.min(1).sum(), table.num_bytes.max(1).sum()
    return BitBudget(8 * float(low * (1 - share) + high * share) / float(table.num_weights.sum()))


def solve_with_highs(table: SensitivityTable, limit: int) -> float | None:
    """Return the value HiGHS finds, ``None`` if it runs out of time."""
    loss, num_bytes = table.loss[0], table.num_bytes
    scale = loss.min(1).sum() / 1e6  # its absolute tolerance of 1e-6 must mean nothing
    one_each = sparse.kron(sparse.eye_array(len(loss)), np.ones((1, loss.shape[1])))
    result = optimize.milp(
        loss.ravel() / scale,
        integrality=np.ones(loss.size),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each.tocsc(), 1, 1),
            optimize.LinearConstraint(num_bytes.reshape(1, -1) / limit * len(loss), ub=len(loss)),
        ],
        options={"mip_rel_gap": 0, "time_limit": HIGHS_SECONDS},
    )
    return None if result.status else float(result.fun * scale)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


if __name__ == "__main__":
    main()
