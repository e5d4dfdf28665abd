"""How far the preset ``best`` should trust gradients: KL by the damping of their second moments.

    python benchmarks/gradient_damping.py [--models NAME ...] [--out FILE]

W3 g128, seed 0. Of Gemma, whose vocabulary takes minutes, six layers are quantized after 16
sequences and judged on 8; the others as everywhere. Damping ``None`` is the preset ``balanced``,
without gradients. Writes ``benchmarks/results/gradient_damping.json`` after every run and goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from corpora import Corpus, corpora, dense_corpora
from one_run import LENGTH, load, quantized

from moeq_plugin.core import row_feedback
from moeq_plugin.models.evaluation import evaluate

RESULT = Path(__file__).parent / "results" / "gradient_damping.json"
DAMPING = (None, 0.05, 0.5, 1.0, 2.0)
SIX_LAYERS = r"re:.*layers\.[0-5]\..*proj"


def main() -> None:
    models = {corpus.name: corpus for corpus in (*corpora(), *dense_corpora())}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(models), choices=models)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    done = {(run["model"], run["damping"]) for run in runs}
    for model, damping in itertools.product(arguments.models, DAMPING):
        if (model, damping) not in done:
            kl = run(models[model], damping)
            runs.append({"model": model, "damping": damping, "kl": kl})
            print(runs[-1], flush=True)
            arguments.out.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


def run(corpus: Corpus, damping: float | None) -> float:
    """Return the held-out KL divergence to the 16-bit model."""
    target, sequences, heldout, batch_size = ("Linear", 64, 96, 8)
    if corpus.is_dense:
        target, sequences, heldout, batch_size = (SIX_LAYERS, 16, 8, 4)
    fields = {"preset": "balanced" if damping is None else "best"}
    with patch.object(row_feedback, "_DAMPENING_FRAC", damping):
        model, _ = quantized(
            corpus, "W3 g128", 0, sequences, fields, target=target, batch_size=batch_size
        )
    rows = torch.cat(corpus.heldout_batches(heldout, LENGTH)).split(2 if corpus.is_dense else 8)
    return evaluate(model, load(corpus), rows).kl


if __name__ == "__main__":
    main()
