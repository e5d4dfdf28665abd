"""What a model loses by each quantizer at equal bytes, and what it takes in time and memory.

    make peers-env
    python benchmarks/peers.py [--models tiny_moe moe_small] [--out FILE]

All contenders get the same token ids, quantize the same linears to the same grids and are measured
by one program (``benchmarks/peer_evaluation.py``), each run in a process of its own
(``benchmarks/peer_programs.py``). Writes ``benchmarks/results/peers.json`` after every run and goes
on where it was stopped. A run that fails or is refused is noted with its reason and not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from corpora import ROOT, Corpus, corpora, dense_corpora
from peer_evaluation import (
    RefusedError,
    load_reference,
    put_in,
    quantized_linears,
    tensors_beside,
)
from safetensors.torch import load_file

from moeq_plugin.core.grid import Grid
from moeq_plugin.models.evaluation import evaluate

RESULT = ROOT / "benchmarks" / "results" / "peers.json"
PROGRAM = ROOT / "benchmarks" / "peer_programs.py"
SEQUENCES, LENGTH, HELDOUT, HELDOUT_OF_GEMMA = 64, 256, 96, 24  # its vocabulary takes minutes
INTERPRETERS = {"gptqmodel": str(ROOT / ".venv-gptq" / "bin" / "python")}
SYMMETRIC = {"W4 g128": Grid(4, 128), "W3 g128": Grid(3, 128), "W2 g64": Grid(2, 64)}
GRIDS = {**SYMMETRIC, "W2 g64 asymmetric": Grid(2, 64, symmetric=False)}


@dataclass(frozen=True)
class Contender:
    """Who quantizes, and with what.

    Attributes:
        program: of ``benchmarks/peer_programs.py``.
        modifier: where the program is llm-compressor.
        fields: whatever is not left at its default.
        num_seeds: more where it is close, or where others are compared with it.
        grids: that differ by what it does.
    """

    program: str
    modifier: str = ""
    fields: Mapping[str, object] = field(default_factory=dict)
    num_seeds: int = 1
    grids: Mapping[str, Grid] = field(default_factory=lambda: GRIDS)


def _ours(grids: Mapping[str, Grid] = GRIDS, **fields: object) -> Contender:
    return Contender("llm-compressor", "MoEQuantModifier", fields, 3, grids)


# the slowest come last
CONTENDERS = {
    "llm-compressor GPTQ": Contender("llm-compressor", "GPTQModifier", num_seeds=3),
    "llm-compressor GPTQ, MSE observer": Contender(
        "llm-compressor", "GPTQModifier", {"weight_observer": "memoryless_mse"}
    ),
    "GPTQModel": Contender("gptqmodel"),
    "ours, fast": _ours(preset="fast"),
    "ours, balanced": _ours(preset="balanced"),
    "ours, balanced, positive scales": _ours(SYMMETRIC, preset="balanced", signed_scales=False),
    "ours, best": _ours(preset="best"),
    "llm-compressor AWQ": Contender("llm-compressor", "AWQModifier"),
    "AutoRound, light": Contender("auto-round", fields={"iters": 50, "lr": 5e-3}),
    "AutoRound": Contender("auto-round", fields={"iters": 200}, num_seeds=3),
    "llm-compressor AutoRound": Contender(
        "llm-compressor", "AutoRoundModifier", {"iters": 200, "enable_torch_compile": False}
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", help="names of benchmarks/corpora.py; all")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    done = {(r["seed"], r["model"], r["contender"], r["grid"]) for r in runs}
    for seed, corpus, name, grid in cases(arguments.models, arguments.contenders):
        if (seed, corpus.name, name, grid) in done:
            continue
        case = {"model": corpus.name, "grid": grid, "seed": seed, "contender": name}
        runs.append({**case, **run(corpus, GRIDS[grid], seed, CONTENDERS[name])})
        print(runs[-1], flush=True)
        content = {"sequences": SEQUENCES, "length": LENGTH, "heldout": HELDOUT, "runs": runs}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def cases(models: list[str] | None, names: list[str]) -> Iterator[tuple[int, Corpus, str, str]]:
    """Yield seeds, models, contenders and grids, in the order in which they are wanted."""
    found = [of for of in [*corpora(), *dense_corpora()] if not models or of.name in models]
    for seed, corpus in itertools.product(range(3), found):
        for name in names:
            contender = CONTENDERS[name]
            for grid, about in contender.grids.items():
                says_nothing = corpus.is_dense and about.num_bits == 4
                if seed < contender.num_seeds and not says_nothing:
                    yield seed, corpus, name, grid


def run(corpus: Corpus, grid: Grid, seed: int, contender: Contender) -> dict[str, object]:
    """Let a contender quantize, and measure; or say why that did not work."""
    model = load_reference(corpus.model)
    linears, beside = quantized_linears(model), tensors_beside(model)
    ids = corpus.calibration_set(SEQUENCES, LENGTH, seed)["input_ids"]
    request = {
        "program": contender.program,
        "modifier": contender.modifier,
        "fields": dict(contender.fields),
        "model": str(corpus.model),
        "ids": [list(row) for row in ids],
        "grid": asdict(grid),
        "linears": list(linears),
        "beside": list(beside),
        "ignore": [n for n, m in model.named_modules() if _is_other_linear(m, linears)],
    }
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "request.json").write_text(json.dumps(request))
        python = INTERPRETERS.get(contender.program, sys.executable)
        process = subprocess.run(
            [python, PROGRAM, directory], cwd=name, capture_output=True, text=True, check=False
        )
        if process.returncode:
            return {"error": process.stderr.strip().splitlines()[-1][:300]}
        quantized = load_file(directory / "weights.safetensors")
        about = json.loads((directory / "run.json").read_text())
    weights = {n: of for n, of in quantized.items() if n in linears}
    others = {n: of for n, of in quantized.items() if n not in linears}
    try:
        changed = put_in(model, weights, others, grid)
    except RefusedError as refusal:
        return {"error": f"refused: {refusal}", **about}
    num_heldout = HELDOUT_OF_GEMMA if corpus.is_dense else HELDOUT
    rows = corpus.heldout_batches(num_heldout, LENGTH)
    result = evaluate(model, load_reference(corpus.model), rows)
    return {
        "kl": result.kl,
        "kl_stderr": result.kl_stderr,
        "perplexity": result.perplexity,
        "reference_perplexity": result.reference_perplexity,
        "routing_agreement": result.routing.jaccard if result.routing else None,
        "changed_beside_linears": changed,
        **about,
    }


def _is_other_linear(module: torch.nn.Module, linears: Mapping[str, torch.nn.Module]) -> bool:
    return isinstance(module, torch.nn.Linear) and not any(module is of for of in linears.values())


if __name__ == "__main__":
    main()
