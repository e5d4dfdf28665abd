"""Whether routers, which stay in 16 bit, should be fitted to what the quantized model feeds them.

    python benchmarks/router_refit.py [--seeds 3] [--models NAME ...] [--out FILE]

After quantization with the preset ``balanced``, layer by layer: the rows of the router are fitted
by damped least squares, so that on the quantized model's tokens they give the logits that the
16-bit model gives the same tokens. The held-out KL before and after is of the same model. Writes
``benchmarks/results/router_refit.json`` after every run and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from corpora import Corpus, corpora
from one_run import GRIDS, HELDOUT, LENGTH, load, quantized
from transformers import PreTrainedModel

from moeq_plugin.models.evaluation import Evaluation, evaluate
from moeq_plugin.models.moe import find_moe_layers

RESULT = Path(__file__).parent / "results" / "router_refit.json"
SEQUENCES, DAMPING = 64, 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=[corpus.name for corpus in corpora()])
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    done = {(r["seed"], r["model"], r["grid"]) for r in runs}
    models = {corpus.name: corpus for corpus in corpora() if corpus.name in arguments.models}
    for seed, model, grid in itertools.product(range(arguments.seeds), models, GRIDS):
        if (seed, model, grid) in done:
            continue
        found = run(models[model], grid, seed)
        runs.append({"seed": seed, "model": model, "grid": grid, **found})
        print(runs[-1], flush=True)
        content = {"sequences": SEQUENCES, "length": LENGTH, "heldout": HELDOUT, "runs": runs}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


@torch.no_grad()
def run(corpus: Corpus, grid: str, seed: int) -> dict[str, float]:
    """Quantize, measure, refit the routers, measure again."""
    model, _ = quantized(corpus, grid, seed, SEQUENCES, {"preset": "balanced"})
    reference = load(corpus)
    heldout = corpus.heldout_batches(HELDOUT, LENGTH)
    before = evaluate(model, reference, heldout)
    ids = torch.tensor(corpus.calibration_set(SEQUENCES, LENGTH, seed)["input_ids"])
    for layer in range(len(find_moe_layers(reference))):
        refit(model, reference, layer, ids)
    after = evaluate(model, reference, heldout)
    return {**_figures(before, "before"), **_figures(after, "after")}


def refit(
    model: PreTrainedModel, reference: PreTrainedModel, layer: int, ids: torch.Tensor
) -> None:
    """Overwrite one router; those before it are final."""
    quantized_inputs, wanted_inputs = (router_inputs(of, layer, ids) for of in (model, reference))
    weight = find_moe_layers(model)[layer].router.weight
    hessian = quantized_inputs.T @ quantized_inputs
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    missing = (wanted_inputs - quantized_inputs) @ weight.T  # [tokens, experts] logits
    weight += torch.linalg.solve(hessian, quantized_inputs.T @ missing).T


def router_inputs(model: PreTrainedModel, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """Return ``[tokens, hidden]``, what a router sees."""
    found: list[torch.Tensor] = []

    def note(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found.append(inputs[0].flatten(0, -2))

    handle = find_moe_layers(model)[layer].router.register_forward_pre_hook(note)
    for rows in ids.split(8):
        model(rows)
    handle.remove()
    return torch.cat(found)


def _figures(result: Evaluation, when: str) -> dict[str, float]:
    return {
        f"kl_{when}": result.kl,
        f"kl_stderr_{when}": result.kl_stderr,
        f"perplexity_{when}": result.perplexity,
        f"routing_agreement_{when}": result.routing.jaccard,
    }


if __name__ == "__main__":
    main()
