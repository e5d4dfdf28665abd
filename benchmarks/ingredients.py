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
import time
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from corpora import Corpus, corpora
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from moeq_plugin import MoEQuantModifier
from moeq_plugin.models.evaluation import evaluate

RESULT = Path(__file__).parent / "results" / "ingredients.json"
SEQUENCES, LENGTH, HELDOUT = 64, 256, 96
GRIDS = {"W4 g128": (4, 128), "W3 g128": (3, 128), "W2 g64": (2, 64)}

NARROW, SIGNED = {"scale_search": "narrow"}, {"signed_scales": True}
ROUNDS, DAMPED = {"refine_rounds": 2}, {"dampening_frac": 0.05}
ROWS = {"row_feedback": True}
CORRECTED = {"corrected_target": True}
CONDITIONAL, GROUP = {"scale_search": "conditional"}, {"scale_search": "group"}
BALANCED = {**NARROW, **SIGNED, **ROUNDS, **DAMPED}
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
    "signed + narrow + 2 rounds + damping": BALANCED,
    "signed, without rounds": {**NARROW, **SIGNED, **DAMPED},
    "signed, without damping": {**NARROW, **SIGNED, **ROUNDS},
    "signed, conditional for narrow": {**CONDITIONAL, **SIGNED, **ROUNDS, **DAMPED},
    "signed, group for narrow": {**GROUP, **SIGNED, **ROUNDS, **DAMPED},
    # with the 16-bit stream beside the quantized one
    "corrected target": CORRECTED,
    "corrected + narrow + 2 rounds + damping": {**CORRECTED, **NARROW, **ROUNDS, **DAMPED},
    "corrected + signed + narrow + 2 rounds + damping": {**CORRECTED, **BALANCED},
    # rows that make up for each other, and one less
    "signed + narrow + 2 rounds + damping + row feedback": {**BALANCED, **ROWS},
    "row feedback, unsigned": {**NARROW, **ROUNDS, **DAMPED, **ROWS},
    "row feedback, without rounds": {**NARROW, **SIGNED, **DAMPED, **ROWS},
    # all of it
    "corrected + row feedback": {**BALANCED, **CORRECTED, **ROWS},
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
        runs.append(run(corpus, grid, seed, contender))
        print(runs[-1], flush=True)
        content = {"sequences": SEQUENCES, "length": LENGTH, "heldout": HELDOUT, "runs": runs}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def run(corpus: Corpus, grid: str, seed: int, contender: str) -> dict[str, object]:
    """Quantize once and measure."""
    load = {"dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(corpus.model, **load)
    num_bits, group_size = GRIDS[grid]
    weights = {"num_bits": num_bits, "strategy": "group", "group_size": group_size}
    group = {"targets": ["Linear"], "weights": weights}
    dataset = corpus.calibration_set(SEQUENCES, LENGTH, seed)
    began = time.process_time()
    oneshot(
        model=model,
        recipe=MoEQuantModifier(
            config_groups={"group_0": group},
            ignore=["lm_head"],
            **{"preset": "fast", **CONTENDERS[contender]},
        ),
        dataset=dataset,
        num_calibration_samples=SEQUENCES,
        max_seq_length=LENGTH,
        shuffle_calibration_samples=False,
        batch_size=8,
    )
    cpu_s = time.process_time() - began
    reference = AutoModelForCausalLM.from_pretrained(corpus.model, **load)
    result = evaluate(model, reference, corpus.heldout_batches(HELDOUT, LENGTH))
    return {
        "model": corpus.name,
        "grid": grid,
        "seed": seed,
        "contender": contender,
        "kl": result.kl,
        "kl_stderr": result.kl_stderr,
        "perplexity": result.perplexity,
        "cpu_s": cpu_s,
    }


if __name__ == "__main__":
    main()
