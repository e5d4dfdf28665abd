"""CPU time and peak memory of one oneshot call: stock GPTQ against MoEQuant.

    python benchmarks/oneshot_speed.py

One layer of 32 experts (hidden 512, intermediate 256, 16 x 256 tokens), one thread. Every run is
a process of its own; the contestants take turns, so that a machine that slows down slows all of
them. Writes ``benchmarks/results/oneshot_speed.json``.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from datasets import Dataset
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

RESULT = Path(__file__).parent / "results" / "oneshot_speed.json"
CONTESTANTS = ("stock, defaults", "stock, batched 32", "MoEQuant", "two forward passes")
ROUNDS = 5
SEQUENCES, LENGTH = 16, 256


def main() -> None:
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
        return
    results = {f"top {k} of 32": compare(k) for k in (2, 4)}
    RESULT.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def compare(top_k: int) -> dict[str, object]:
    """Run all contestants in turn and return medians and paired ratios."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as directory:
        make_model(top_k, Path(directory))
        for _ in range(ROUNDS):
            for name in CONTESTANTS:
                command = [sys.executable, __file__, name, str(top_k), directory]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(top_k, name, runs[name][-1], flush=True)
    return {
        "runs": runs,
        "median": {
            name: {key: statistics.median(run[key] for run in of) for key in of[0]}
            for name, of in runs.items()
        },
        "cpu_ratio_of_MoEQuant": {
            name: statistics.median(
                ours["cpu_s"] / theirs["cpu_s"]
                for ours, theirs in zip(runs["MoEQuant"], runs[name], strict=True)
            )
            for name in CONTESTANTS
            if name != "MoEQuant"
        },
    }


def make_model(top_k: int, directory: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=512,
        moe_intermediate_size=256,
        num_experts=32,
        num_experts_per_tok=top_k,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=512,
        norm_topk_prob=True,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(directory)


def measure(name: str, top_k: int, directory: Path) -> dict[str, float]:
    """Quantize once in this process; imports and loading are not counted."""
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.modifiers.gptq import GPTQModifier

    from moeq_plugin import MoEQuantModifier

    torch.set_num_threads(1)
    model = Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.randint(0, 512, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    linearize_moe(model)
    scheme = {"scheme": "W4A16", "ignore": ["lm_head"]}
    recipes = {
        "stock, defaults": lambda: GPTQModifier(**scheme),
        "stock, batched 32": lambda: GPTQModifier(**scheme, batched_quantization=32),
        "MoEQuant": lambda: MoEQuantModifier(preset="fast", **scheme),
    }
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    if name in recipes:
        oneshot(
            model=model,
            recipe=recipes[name](),
            dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
            processor=object(),
            max_seq_length=LENGTH,
        )
    else:  # what the host's sequential pipeline cannot do without
        with torch.no_grad():
            for _ in range(2):
                for row in ids:
                    model(row[None])
    used = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before
    return {"cpu_s": used, "peak_mib_above_loading": peak / 1024}


if __name__ == "__main__":
    main()
