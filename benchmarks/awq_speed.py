"""CPU time of AWQ's search: llm-compressor's and ours, one sequence or eight at a time.

    python benchmarks/awq_speed.py [--rounds N]

The shipped model, 64 x 256 tokens, 4 bits, one thread, every run a process of its own, in turn.
Writes ``benchmarks/results/awq_speed.json`` after every round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

RESULT = Path(__file__).parent / "results" / "awq_speed.json"
SEQUENCES, LENGTH = 64, 256
RUNS = [(name, batch_size) for name in ("llm-compressor", "ours") for batch_size in (1, 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # a run in its own process
    arguments = parser.parse_args()
    if arguments.measure:
        name, batch_size, seed = arguments.measure
        print(measure(name, int(batch_size), int(seed)))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    found = []
    for seed in range(arguments.rounds):
        for name, batch_size in RUNS:
            request = ["--measure", name, str(batch_size), str(seed)]
            said = subprocess.run(
                [sys.executable, __file__, *request], check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            cpu_s = float(said.splitlines()[-1])
            found.append({"awq": name, "batch_size": batch_size, "seed": seed, "cpu_s": cpu_s})
            print(found[-1], flush=True)
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


def measure(name: str, batch_size: int, seed: int) -> float:
    """Return the CPU seconds of ``oneshot``."""
    import torch
    from corpora import corpora
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM

    from moeq_plugin import MoEQuantAWQModifier
    from moeq_plugin.integrations.llm_compressor.host import without_pinning

    torch.set_num_threads(1)
    corpus = corpora()[0]
    awq = {"llm-compressor": AWQModifier, "ours": MoEQuantAWQModifier}[name]()
    model = AutoModelForCausalLM.from_pretrained(corpus.model, dtype=torch.float32)
    data = corpus.calibration_set(SEQUENCES, LENGTH, seed)
    began = time.process_time()
    with without_pinning():  # llm-compressor's fails without an accelerator otherwise
        oneshot(
            model=model,
            recipe=[awq, QuantizationModifier(scheme="W4A16", ignore=["lm_head", "re:.*gate$"])],
            dataset=data,
            num_calibration_samples=SEQUENCES,
            max_seq_length=LENGTH,
            batch_size=batch_size,
        )
    return time.process_time() - began


if __name__ == "__main__":
    main()
