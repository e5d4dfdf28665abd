"""What a prior of white noise is worth, by how much calibration text there is.

    python benchmarks/few_tokens.py [--seeds 3] [--models NAME ...] [--out FILE]

Writes ``benchmarks/results/few_tokens.json`` after every run and goes on where it was stopped. The
solver is the preset ``balanced`` with different ``prior_tokens``; runs of a seed and a number of
sequences are paired.
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
from one_run import HELDOUT, LENGTH, one_run

RESULT = Path(__file__).parent / "results" / "few_tokens.json"
GRIDS = ("W3 g128", "W2 g64")
SEQUENCES = (4, 16, 64, 256)
PRIORS = (0.0, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=[corpus.name for corpus in corpora()])
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    names = ("seed", "sequences", "model", "grid", "prior_tokens")
    done = {tuple(r[name] for name in names) for r in runs}
    models = {corpus.name: corpus for corpus in corpora() if corpus.name in arguments.models}
    for case in itertools.product(range(arguments.seeds), SEQUENCES, models, GRIDS, PRIORS):
        if case in done:
            continue
        seed, sequences, model, grid, prior = case
        fields = {"prior_tokens": prior}
        found = one_run(models[model], grid, seed, sequences, fields)
        runs.append({**dict(zip(names, case, strict=True)), **found})
        print(runs[-1], flush=True)
        content = {"length": LENGTH, "heldout": HELDOUT, "runs": runs}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
