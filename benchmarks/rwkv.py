"""Held-out distance to the original RWKV-7 at equal bits: grids, codebooks and hybrids of both.

    python benchmarks/rwkv.py [--quick] [--model FOLDER]

Writes ``benchmarks/results/rwkv.json``; ``--table`` prints its tables. Every method of one seed
sees the same calibration sequences, so differences are paired and their standard error is over
seeds. Bits per weight are those of the quantized weights with indices, codebooks, scales and zero
points, scales counted at 16 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from corpora import ROOT, SEPARATOR, Corpus
from llmcompressor import oneshot
from torch import nn
from transformers import AutoModelForCausalLM

import moeq_plugin.rwkv  # noqa: F401 - makes transformers know RWKV-7
from moeq_plugin import RWKVQuantModifier
from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.core.hybrid import choose_scalar, choose_scalar_below
from moeq_plugin.core.uniformity import UniformityScore, score_uniformity
from moeq_plugin.models.elementwise import ElementwiseScale
from moeq_plugin.models.evaluation import Evaluation, evaluate
from moeq_plugin.models.packed import (
    CodebookLinear,
    CodebookScale,
    packed_modules,
    unpack_modules,
)

RESULT = ROOT / "benchmarks" / "results" / "rwkv.json"
SEQUENCES, LENGTH, HELDOUT, SEEDS = 16, 128, 32, (0, 1, 2)
# budget: columns that share a scale, format of codebooks
BUDGETS = {
    "3.3": (64, CodebookFormat(6, 2, group_rows=128, group_columns=32)),
    "3.6": (32, CodebookFormat(6, 2, group_rows=64, group_columns=32)),
}
Scorer = Callable[[str, torch.Tensor], float | UniformityScore]


def kurtosis(_name: str, weight: torch.Tensor) -> float:
    centered = weight - weight.mean()
    return (centered**4).mean().item() / centered.square().mean().item() ** 2


def incoherence(_name: str, weight: torch.Tensor) -> float:
    return weight.abs().max().item() * weight.numel() ** 0.5 / weight.norm().item()


def distinct_gaps(_name: str, weight: torch.Tensor) -> UniformityScore:
    """Return the proxy that the published thresholds belong to."""
    return score_uniformity(weight.half(), "unique")


def scorers(seed: int) -> dict[str, Scorer]:
    """Return what weights are ranked by instead of the proxy; the largest get codebooks."""
    return {
        "variance": lambda _name, w: w.var().item(),
        "range": lambda _name, w: (w.max() - w.min()).item(),
        "kurtosis": kurtosis,
        "incoherence": incoherence,
        "chance": lambda name, _w: random.Random(f"{seed} {name}").random(),
    }


class RankedBy(RWKVQuantModifier):
    """The modifier with another ranking."""

    def score_weights(self, linears: dict[str, nn.Linear]) -> dict[str, UniformityScore]:
        """Return the other measure in place of both proxies."""
        values = {n: self._scorer(n, m.weight.detach().double()) for n, m in linears.items()}
        return {
            name: value if isinstance(value, UniformityScore) else UniformityScore(value, value, 2)
            for name, value in values.items()
        }

    _scorer: Any = None


def ranked_by(scorer: Scorer, **arguments: Any) -> RankedBy:
    modifier = RankedBy(**arguments)
    modifier._scorer = scorer
    return modifier


def methods(group_size: int, codebook: CodebookFormat, seed: int) -> dict[str, Any]:
    """Return the modifiers of one budget by name."""
    weights = {"num_bits": 3, "symmetric": False, "strategy": "group", "group_size": group_size}
    groups = {"scalar": {"targets": ["Linear"], "weights": weights}}
    common = {"config_groups": groups, "codebook": codebook, "elementwise": None}
    result: dict[str, Any] = {
        "GPTQ only": RWKVQuantModifier(**common, scalar_frac=1.0),
        "codebook only": RWKVQuantModifier(**common, scalar_frac=0.0),
        "hybrid, proxy by rank": RWKVQuantModifier(**common),
        "hybrid, published thresholds": ranked_by(distinct_gaps, **common, thresholds=(1.54, 30.0)),
        "hybrid, released rule (incoherence > 8)": ranked_by(
            incoherence, **common, thresholds=(8.0, 8.0)
        ),
    }
    for name, scorer in scorers(seed).items():
        result[f"hybrid, {name}"] = ranked_by(scorer, **common)
    if seed == SEEDS[0]:  # takes no data
        result["RTN"] = RWKVQuantModifier(**common, scalar_frac=1.0, dampening_frac=1e9)
    return result


def elementwise_methods(group_size: int, codebook: CodebookFormat) -> dict[str, Any]:
    """Return the proxy's hybrid with element-wise weights in codebooks, fitted in several ways."""
    weights = {"num_bits": 3, "symmetric": False, "strategy": "group", "group_size": group_size}
    groups = {"scalar": {"targets": ["Linear"], "weights": weights}}
    common = {"config_groups": groups, "codebook": codebook}
    return {
        "element-wise unweighted": RWKVQuantModifier(**common, elementwise_weighted=False),
        "element-wise weighted": RWKVQuantModifier(**common),
        "element-wise weighted, no clipping": RWKVQuantModifier(
            **common, elementwise_percentile=100
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, a few sequences")
    parser.add_argument("--table", action="store_true", help="print the tables of the results")
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "assets" / "tiny_rwkv")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.table:
        print(tables(json.loads(arguments.out.read_text())))
        return
    torch.set_num_threads(1)
    corpus = load_corpus(arguments.model)
    seeds, sequences, heldout = ((0,), 4, 8) if arguments.quick else (SEEDS, SEQUENCES, HELDOUT)
    batches = corpus.heldout_batches(heldout, LENGTH)
    reference = Remembered(load(corpus.model), batches)
    content: dict[str, Any] = {"sequences": sequences, "length": LENGTH, "heldout": heldout}
    content |= {"model": corpus.name, "runs": [], "file": measure_file(corpus, sequences)}
    began = time.monotonic()
    for seed in seeds:
        cases = [(b, n, m) for b, of in BUDGETS.items() for n, m in methods(*of, seed).items()]
        cases += [("3.3", n, m) for n, m in elementwise_methods(*BUDGETS["3.3"]).items()]
        done: dict[Any, dict[str, Any]] = {}
        for budget, name, modifier in cases:
            model = load(corpus.model)
            # rules that choose the same weights give the same model
            same = (budget, modifier.elementwise and name, name == "RTN", chosen(modifier, model))
            if same not in done:
                dense = {n: p.shape.numel() for n, p in model.named_parameters()}
                quantize(model, modifier, corpus, sequences, seed)
                described = describe(model, dense)
                unpack_modules(model)
                found = evaluate(model.eval(), reference, batches)
                done[same] = {**described, **distances(found)}
            content["runs"].append({"budget": budget, "method": name, "seed": seed, **done[same]})
            print(f"{time.monotonic() - began:.0f} s {content['runs'][-1]}", flush=True)
            arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def load_corpus(model: Path) -> Corpus:
    """Return the model with the text that it was not trained on and some that it was."""
    assets = ROOT / "examples" / "assets"
    calibration, heldout = (
        (assets / f"{name}.txt").read_text().split(SEPARATOR) for name in ("calibration", "heldout")
    )
    return Corpus(model.name, model, calibration, heldout)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


class Remembered(nn.Module):
    """A model that has run already on the only batches that it will see."""

    def __init__(self, model: nn.Module, batches: list[torch.Tensor]) -> None:
        super().__init__()
        with torch.no_grad():
            self._logits = {batch: model(input_ids=batch).logits for batch in batches}

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        """Return what the model has returned."""
        return SimpleNamespace(logits=self._logits[input_ids])


def quantize(
    model: Any, modifier: Any, corpus: Corpus, sequences: int, seed: int, **arguments: Any
) -> None:
    oneshot(
        model=model,
        recipe=modifier,
        dataset=corpus.calibration_set(sequences, LENGTH, seed),
        num_calibration_samples=sequences,
        max_seq_length=LENGTH,
        batch_size=8,
        **arguments,
    )


def chosen(modifier: Any, model: nn.Module) -> frozenset[str]:
    """Return the linears that a modifier will leave on a scalar grid."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    scores = modifier.score_weights(linears)
    if modifier.thresholds is not None:
        return choose_scalar_below(scores, *modifier.thresholds)
    return choose_scalar(scores, scalar_frac=modifier.scalar_frac)


def distances(found: Evaluation) -> dict[str, float]:
    names = ("kl", "kl_stderr", "perplexity", "reference_perplexity")
    return {name: getattr(found, name) for name in names}


def describe(model: Any, dense: dict[str, int]) -> dict[str, Any]:
    """Return the bits that quantized weights take and how many have which format."""
    packed = packed_modules(model)
    bits = weights = scalar = in_codebooks = 0
    for module in packed.values():
        bits += module.form.num_bits(module.matrix_shape)
        weights += module.weight_shape.numel()
        in_codebooks += module.weight_shape.numel() * isinstance(module, CodebookLinear)
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            args, numel = scheme.weights, dense[f"{name}.weight"]
            bits += numel * args.num_bits + numel // args.group_size * (16 + args.num_bits)
            weights += numel
            scalar += 1
    return {
        "bits_per_weight": bits / weights,
        "num_scalar": scalar,
        "num_codebook": sum(isinstance(m, CodebookLinear) for m in packed.values()),
        "codebook_frac": in_codebooks / weights,  # of the quantized elements
        "num_elementwise": sum(isinstance(m, CodebookScale) for m in packed.values()),
    }


def measure_file(corpus: Corpus, sequences: int) -> dict[str, float]:
    """Save the default recipe's result in bfloat16 and compare the file with what is reported."""
    model = load(corpus.model, torch.bfloat16)
    kinds = (nn.Linear, ElementwiseScale)
    names = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    total = sum(p.numel() for p in model.parameters())
    quantized = sum(
        p.numel() for n, p in model.named_parameters()
        if n.rpartition(".")[0] in names - {"lm_head"} and n.endswith(".weight")
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        quantize(model, RWKVQuantModifier(), corpus, sequences, 0, output_dir=str(out))
        run = json.loads((out / "moeq_run.json").read_text())["runs"][0]
        size = (out / "model.safetensors").stat().st_size
        with (out / "model.safetensors").open("rb") as file:
            index = 8 + int.from_bytes(file.read(8), "little")
    stated = quantized * run["bits_per_weight"] / 8 + 2 * (total - quantized)
    return {
        "bytes": size,
        "index_bytes": index,  # names and shapes of the tensors
        "stated_bytes": stated,
        "bfloat16_bytes": 2 * total,
        "ratio": size / stated,
        "ratio_without_index": (size - index) / stated,
        "bits_per_weight": run["bits_per_weight"],
    }


def tables(content: dict[str, Any]) -> str:
    """Return KL to 16 bit, mean over seeds, with its paired change against GPTQ alone."""
    runs = content["runs"]
    rows = ["| method | bits | in codebooks | KL to 16 bit | against GPTQ only | perplexity |"]
    rows.append("|---" * 6 + "|")
    base = {(r["budget"], r["seed"]): r["kl"] for r in runs if r["method"] == "GPTQ only"}
    by_method: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        by_method.setdefault((run["budget"], run["method"]), []).append(run)
    for (budget, method), of in sorted(by_method.items(), key=lambda item: item[0][0]):
        change = [100 * (r["kl"] / base[budget, r["seed"]] - 1) for r in of]
        error = f" ± {statistics.stdev(change) / len(of) ** 0.5:.1f}" if len(of) > 1 else ""
        keys = ("bits_per_weight", "kl", "codebook_frac", "perplexity")
        mean = {key: statistics.mean(r[key] for r in of) for key in keys}
        count = statistics.mean(r["num_codebook"] for r in of)
        rows.append(
            f"| {method} | {mean['bits_per_weight']:.3f} | {count:.0f}, "
            f"{100 * mean['codebook_frac']:.0f} % | {mean['kl']:.5f} "
            f"| {statistics.mean(change):+.1f}{error} % | {mean['perplexity']:.3f} |"
        )
    reference = runs[0]["reference_perplexity"]
    pairs = [
        ("3.3", "element-wise weighted", "element-wise unweighted"),
        ("3.3", "element-wise weighted", "element-wise weighted, no clipping"),
        ("3.3", "element-wise weighted", "hybrid, proxy by rank"),
        *((budget, "hybrid, proxy by rank", "hybrid, chance") for budget in BUDGETS),
        *((budget, "hybrid, proxy by rank", "codebook only") for budget in BUDGETS),
    ]
    lines = [paired(by_method[b, one], by_method[b, other]) for b, one, other in pairs]
    return "\n".join([*rows, "", *lines, "", f"Perplexity in 16 bit: {reference:.3f}", ""])


def paired(of_one: list[dict[str, Any]], of_other: list[dict[str, Any]]) -> str:
    """Return how much larger the KL of one method is than that of another, seed by seed."""
    pairs = zip(of_one, of_other, strict=True)
    change = [100 * (one["kl"] / other["kl"] - 1) for one, other in pairs]
    error = statistics.stdev(change) / len(change) ** 0.5 if len(change) > 1 else float("nan")
    one, other = of_one[0], of_other[0]
    return (
        f"- {one['budget']} bits, {one['method']} against {other['method']}: "
        f"{statistics.mean(change):+.1f} ± {error:.1f} %"
    )


if __name__ == "__main__":
    main()
