"""Is a checkpoint that several processes make as good as the one that a single process makes?

    python benchmarks/several_processes.py

Runs ``examples/several_processes.py`` as the README does, with 1, 2, 3 and 4 processes, and
measures each checkpoint on held-out text. Sums over ranks round otherwise than sums in one process;
where that tips a rounding tie, a later layer sees another input, so codes differ more from layer
to layer. Writes ``benchmarks/results/several_processes.json``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from corpora import ROOT, corpora
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moeq_plugin import evaluate
from moeq_plugin.integrations.llm_compressor.checkpoint.loading import load_dequantized

RESULT = Path(__file__).parent / "results" / "several_processes.json"
EXAMPLE = ROOT / "examples" / "several_processes.py"
LENGTH, HELDOUT = 256, 96


def main() -> None:
    torch.set_num_threads(1)
    corpus = corpora()[0]  # the model of the example
    heldout = corpus.heldout_batches(HELDOUT, LENGTH)
    reference = AutoModelForCausalLM.from_pretrained(corpus.model, dtype=torch.float32)
    runs = []
    with tempfile.TemporaryDirectory() as directory:
        for processes in (1, 2, 3, 4):
            out = Path(directory) / str(processes)
            quantize(processes, out)
            model = load_dequantized(out).float()
            result = evaluate(model, reference, heldout)
            equal = equal_words(Path(directory) / "1", out)
            run = {"processes": processes, "kl": result.kl, "kl_stderr": result.kl_stderr}
            runs.append({**run, "equal_words_by_layer": equal})
            print(runs[-1], flush=True)
    RESULT.write_text(json.dumps({"heldout": HELDOUT, "length": LENGTH, "runs": runs}, indent=1))


def quantize(processes: int, out: Path) -> None:
    """Run the example; alone without ``torchrun``, as one would."""
    launch = [sys.executable, str(EXAMPLE), str(out)]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        launch = [sys.executable, *torchrun, *launch[1:]]
    subprocess.run(launch, check=True, capture_output=True)


def equal_words(one: Path, other: Path) -> list[float]:
    """Return the share of packed words, eight codes each, that are equal, layer by layer."""
    ours, theirs = (
        {k: v for path in sorted(of.glob("*.safetensors")) for k, v in load_file(path).items()}
        for of in (one, other)
    )
    equal: dict[int, list[torch.Tensor]] = {}
    for name in ours:
        if name.endswith("weight_packed"):
            layer = int(name.split("layers.")[1].split(".")[0])
            equal.setdefault(layer, []).append((ours[name] == theirs[name]).flatten())
    return [torch.cat(equal[layer]).double().mean().item() for layer in sorted(equal)]


if __name__ == "__main__":
    main()
