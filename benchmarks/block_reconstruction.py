"""Whether learning the rounding block by block, from our solution on, makes it better.

    python benchmarks/block_reconstruction.py [--seeds 1] [--models NAME ...] [--out FILE]

After quantization with the preset ``balanced``, layer by layer: codes move by gradients (straight
through the rounding, the sign of the gradient as AutoRound takes it, a step of 1 / iterations that
falls to 0), so that the layer's output on the quantized model's tokens is that of the 16-bit model.
Scales stay. The held-out KL before and after is of the same model. Writes
``benchmarks/results/block_reconstruction.json`` after every run and goes on where it was stopped.
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
from one_run import GRIDS, HELDOUT, LENGTH, losses, quantized
from peer_evaluation import load_reference
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

RESULT = Path(__file__).parent / "results" / "block_reconstruction.json"
SEQUENCES, ITERATIONS, BATCH = 64, (50, 200), 8


class Rounded(nn.Module):
    """A weight on its grid, with a gradient as if it were not rounded.

    What is learned is where each weight would stand without rounding, in steps of its scale: at
    first where it stood in the 16-bit model, or as near to that as still gives the code found.
    """

    def __init__(self, scale: torch.Tensor, reach: int) -> None:
        super().__init__()
        self.scale, self.reach = scale, reach

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        """Return ``[out, in]``, the weights that ``places`` round to."""
        limited = places.clamp(-self.reach, self.reach - 1)
        return (limited + (limited.round() - limited).detach()) * self.scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=[corpus.name for corpus in corpora()])
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    done = {(r["seed"], r["iterations"], r["model"], r["grid"]) for r in runs}
    models = {corpus.name: corpus for corpus in corpora() if corpus.name in arguments.models}
    for case in itertools.product(range(arguments.seeds), ITERATIONS, models, GRIDS):
        if case in done:
            continue
        seed, iterations, model, grid = case
        found = run(models[model], grid, seed, iterations)
        names = ("seed", "iterations", "model", "grid")
        runs.append({**dict(zip(names, case, strict=True)), **found})
        print(runs[-1], flush=True)
        content = {"sequences": SEQUENCES, "length": LENGTH, "heldout": HELDOUT, "runs": runs}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def run(corpus: Corpus, grid: str, seed: int, iterations: int) -> dict[str, float]:
    """Quantize, measure, learn the rounding of every layer, measure again."""
    torch.manual_seed(seed)
    model, cpu_s = quantized(corpus, grid, seed, SEQUENCES, {"preset": "balanced"})
    reference = load_reference(corpus.model)
    before = losses(model, reference, corpus)
    ids = torch.tensor(corpus.calibration_set(SEQUENCES, LENGTH, seed)["input_ids"])
    began = time.process_time()
    model.requires_grad_(False)
    for layer in range(len(model.model.layers)):
        reconstruct(model, reference, layer, ids, iterations)
    learning_s = time.process_time() - began
    after = losses(model, reference, corpus)
    return {
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
        "cpu_s": cpu_s,
        "learning_cpu_s": learning_s,
    }


def reconstruct(
    model: PreTrainedModel, reference: PreTrainedModel, layer: int, ids: torch.Tensor, number: int
) -> None:
    """Learn the rounding of one layer; those before it are final."""
    block = model.model.layers[layer]
    inputs, about, _ = streams(model, layer, ids)
    _, _, wanted = streams(reference, layer, ids)
    of_reference = dict(reference.model.layers[layer].named_modules())
    linears = {
        name: module
        for name, module in block.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    places = [be_learned(linear, of_reference[name].weight) for name, linear in linears.items()]
    for step in range(number):
        rows = torch.randperm(len(ids))[:BATCH]
        loss = (_tensor(block(inputs[rows], **about)) - wanted[rows]).square().mean()
        gradients = torch.autograd.grad(loss, places, allow_unused=True)
        with torch.no_grad():
            for place, gradient in zip(places, gradients, strict=True):
                if gradient is not None:
                    place -= (1 - step / number) / number * gradient.sign()
    for linear in linears.values():
        parametrize.remove_parametrizations(linear, "weight")
        linear.weight.requires_grad_(False)


def be_learned(linear: nn.Linear, weight: torch.Tensor) -> torch.Tensor:
    """Let gradients move a rounded weight; return what they move, ``[out, in]``."""
    linear.quantization_enabled = False  # or the host would round what is learned
    scale = linear.weight_scale.repeat_interleave(
        linear.weight.shape[1] // linear.weight_scale.shape[1], 1
    )
    codes = (linear.weight / scale).round()
    places = codes + (weight / scale - codes).clamp(-0.499, 0.499)
    reach = 1 << (linear.quantization_scheme.weights.num_bits - 1)
    parametrize.register_parametrization(linear, "weight", Rounded(scale, reach))
    of_linear: torch.Tensor = linear.parametrizations.weight.original
    of_linear.data = places
    return of_linear.requires_grad_(True)


@torch.no_grad()
def streams(
    model: PreTrainedModel, layer: int, ids: torch.Tensor
) -> tuple[torch.Tensor, dict[str, object], torch.Tensor]:
    """Return a layer's inputs, what else it is given, and its outputs, ``[sequences, ...]``."""
    inputs, outputs, about = [], [], {}

    def note(_: nn.Module, given: tuple[torch.Tensor], others: dict[str, object], out: object):
        inputs.append(given[0])
        outputs.append(_tensor(out))
        about.update(others)

    handle = model.model.layers[layer].register_forward_hook(note, with_kwargs=True)
    for rows in ids.split(BATCH):
        model(rows, use_cache=False)
    handle.remove()
    return torch.cat(inputs), about, torch.cat(outputs)


def _tensor(found: object) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found[0]


if __name__ == "__main__":
    main()
