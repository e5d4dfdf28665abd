"""What each ingredient of the solver changes: alone, and left out of the stack of all.

    python benchmarks/ingredients.py [--seeds 3] [--out FILE]

Writes ``benchmarks/results/ingredients.json`` after every run and goes on where it was stopped.
All runs of a seed see the same calibration sequences in the same order; differences are paired.
CPU seconds are those of the whole ``oneshot`` call, of one thread, without loading the model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from corpora import corpora
from one_run import GRIDS, HELDOUT, LENGTH, one_run

RESULT = Path(__file__).parent / "results" / "ingredients.json"
SEQUENCES = 64

NARROW, SIGNED = {"scale_search": "narrow"}, {"signed_scales": True}
MODERATE, PRIOR = {"scale_search": "moderate"}, {"prior_tokens": 0.8}
ROUNDS, DAMPED = {"refine_rounds": 2}, {"dampening_frac": 0.05}
ROWS = {"row_feedback": True}
CORRECTED = {"corrected_target": True}
CONDITIONAL, GROUP = {"scale_search": "conditional"}, {"scale_search": "group"}
NARROW_STACK = {**NARROW, **SIGNED, **ROUNDS, **DAMPED}
BALANCED = {"preset": "balanced"}
DAMPED_BALANCED = {**BALANCED, **DAMPED}
CONTENDERS: dict[str, dict[str, object]] = {
    "default": {},
    # one alone
    "observer memoryless_mse": {"weight_observer": "memoryless_mse"},
    "narrow search": NARROW,
    "conditional search": CONDITIONAL,
    "group search": GROUP,
    "2 rounds": ROUNDS,
    "damping 0.05": DAMPED,
    "narrow, signed": {**NARROW, **SIGNED},
    # positive scales: all, and one less
    "narrow + 2 rounds + damping": {**NARROW, **ROUNDS, **DAMPED},
    "without search": {**ROUNDS, **DAMPED},
    "without rounds": {**NARROW, **DAMPED},
    "without damping": {**NARROW, **ROUNDS},
    "conditional for narrow": {**CONDITIONAL, **ROUNDS, **DAMPED},
    "group for narrow": {**GROUP, **ROUNDS, **DAMPED},
    # signed scales: likewise
    "signed + narrow + 2 rounds + damping": NARROW_STACK,
    "signed, without rounds": {**NARROW, **SIGNED, **DAMPED},
    "signed, without damping": {**NARROW, **SIGNED, **ROUNDS},
    "signed, conditional for narrow": {**CONDITIONAL, **SIGNED, **ROUNDS, **DAMPED},
    "signed, group for narrow": {**GROUP, **SIGNED, **ROUNDS, **DAMPED},
    # with the 16-bit stream beside the quantized one
    "corrected target": CORRECTED,
    "corrected + narrow + 2 rounds + damping": {**CORRECTED, **NARROW, **ROUNDS, **DAMPED},
    "corrected + signed + narrow + 2 rounds + damping": {**CORRECTED, **NARROW_STACK},
    # rows that make up for each other, and one less
    "signed + narrow + 2 rounds + damping + row feedback": {**NARROW_STACK, **ROWS},
    "row feedback, unsigned": {**NARROW, **ROUNDS, **DAMPED, **ROWS},
    "row feedback, without rounds": {**NARROW, **SIGNED, **DAMPED, **ROWS},
    "corrected + row feedback": {**NARROW_STACK, **CORRECTED, **ROWS},
    # the presets, and one less
    "moderate search": MODERATE,
    "prior": PRIOR,
    "balanced": BALANCED,
    "damped": DAMPED_BALANCED,
    "damped, without search": {**DAMPED_BALANCED, "scale_search": "given", "signed_scales": False},
    "damped, without signs": {**DAMPED_BALANCED, "signed_scales": False},
    "damped, without rounds": {**DAMPED_BALANCED, "refine_rounds": 0},
    "damped, without prior": {**DAMPED_BALANCED, "prior_tokens": 0.0},
    "best": {"preset": "best"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=[corpus.name for corpus in corpora()])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    done = {(r["seed"], r["model"], r["grid"], r["contender"]) for r in runs}
    models = [corpus for corpus in corpora() if corpus.name in arguments.models]
    names = arguments.contenders
    cases = itertools.product(range(arguments.seeds), models, GRIDS, names)
    for seed, corpus, grid, contender in cases:
        if (seed, corpus.name, grid, contender) in done:
            continue
        fields = {"preset": "fast", **CONTENDERS[contender]}
        case = {"model": corpus.name, "grid": grid, "seed": seed, "contender": contender}
        runs.append({**case, **one_run(corpus, grid, seed, SEQUENCES, fields)})
        print(runs[-1], flush=True)
        content = {"sequences": SEQUENCES, "length": LENGTH, "heldout": HELDOUT, "runs": runs}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
