"""Held-out distance to the original of stock GPTQ and MoEQuant, same data, same grids.

    python benchmarks/quality.py [--quick]

Writes ``benchmarks/results/quality.json``. Every method of one seed sees the same calibration
sequences; differences are therefore paired and their standard error is over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from corpora import Corpus, corpora
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM

from moeq_plugin import MoEQuantModifier
from moeq_plugin.models.evaluation import evaluate

RESULT = Path(__file__).parent / "results" / "quality.json"
SEQUENCES, LENGTH = 64, 256
HELDOUT = 96
METHODS: dict[str, tuple[bool, Callable[..., object]]] = {
    # name: (all tokens to all experts, modifier)
    "GPTQ, all experts": (True, lambda **k: GPTQModifier(batched_quantization=16, **k)),
    "GPTQ, routed tokens": (False, lambda **k: GPTQModifier(batched_quantization=16, **k)),
    "MoEQuant, power 0": (True, lambda **k: MoEQuantModifier(preset="fast", affinity_power=0, **k)),
    "MoEQuant": (True, lambda **k: MoEQuantModifier(preset="fast", **k)),
    "MoEQuant, power 2": (True, lambda **k: MoEQuantModifier(preset="fast", affinity_power=2, **k)),
    "MoEQuant, no guard": (
        True,
        lambda **k: MoEQuantModifier(preset="fast", min_effective_tokens=0, **k),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, a few sequences")
    parser.add_argument("--out", type=Path, default=RESULT)
    quick = (arguments := parser.parse_args()).quick
    torch.set_num_threads(1)
    seeds, sequences, heldout = ((0,), 8, 16) if quick else ((0, 1, 2), SEQUENCES, HELDOUT)
    runs = []
    cases = list(itertools.product(corpora(), (4, 3), seeds, METHODS))
    began = time.monotonic()
    for done, (corpus, num_bits, seed, method) in enumerate(cases, 1):
        runs.append(run(corpus, num_bits, seed, method, sequences, heldout))
        left = (time.monotonic() - began) / done * (len(cases) - done)
        print(f"[{done}/{len(cases)}, {left / 60:.0f} min left] {runs[-1]}", flush=True)
        content = {"sequences": sequences, "length": LENGTH, "heldout": heldout, "runs": runs}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def run(
    corpus: Corpus, num_bits: int, seed: int, method: str, sequences: int, heldout: int
) -> dict[str, object]:
    """Quantize once and measure."""
    load = {"dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(corpus.model, **load)
    all_experts, modifier = METHODS[method]
    weights = {"num_bits": num_bits, "strategy": "group", "group_size": 128}
    group = {"targets": ["Linear"], "weights": weights}
    oneshot(
        model=model,
        recipe=modifier(config_groups={"group_0": group}, ignore=["lm_head"]),
        dataset=corpus.calibration_set(sequences, LENGTH, seed),
        num_calibration_samples=sequences,
        max_seq_length=LENGTH,
        moe_calibrate_all_experts=all_experts,
        batch_size=8,
    )
    reference = AutoModelForCausalLM.from_pretrained(corpus.model, **load)
    result = evaluate(model, reference, corpus.heldout_batches(heldout, LENGTH))
    return {
        "model": corpus.name,
        "num_bits": num_bits,
        "seed": seed,
        "method": method,
        "kl": result.kl,
        "kl_stderr": result.kl_stderr,
        "perplexity": result.perplexity,
        "reference_perplexity": result.reference_perplexity,
        "top1_agreement": result.top1_agreement,
    }


if __name__ == "__main__":
    main()
