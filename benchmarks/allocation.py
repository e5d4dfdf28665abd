"""Bit allocation against its peers: same quantizer, same bytes, measured on held-out text.

    python benchmarks/allocation.py [--quick]

Writes ``benchmarks/results/allocation.json`` after every seed; seeds found there are not run
again (delete the file to start over). Weights are rounded once per option by ``MoEQuantModifier``;
an allocation then only says which of them a linear gets. Sizes are those of a bfloat16 checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import numpy as np
import torch
from corpora import KINDS, MOE_SMALL, Corpus, corpora, kinds_of_text
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from peer_scores import ExpertErrors, expert_errors, nearest, observe
from scipy.stats import spearmanr
from torch import nn
from transformers import AutoModelForCausalLM

from moeq_plugin import MoEQuantModifier
from moeq_plugin.core.allocation import BitBudget, InfeasibleBudgetError, allocate_bits
from moeq_plugin.core.grid import Grid
from moeq_plugin.core.sensitivity import SensitivityTable
from moeq_plugin.integrations.llm_compressor.allocation.options import parse_options
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity import SensitivityModifier
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity_config import SensitivityConfig
from moeq_plugin.models.moe import find_moe_layers

RESULT = Path(__file__).parent / "results" / "allocation.json"
OPTIONS = ["W2A16", "W3A16", "W4A16", "W8A16"]
BUDGETS = (2.25, 2.5, 3.0, 3.5)
SEQUENCES, LENGTH, HELDOUT, RANDOM, PAIRS = 48, 256, 16, 2, 50
PER_DOMAIN = 8
Choice = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, few sequences")
    parser.add_argument("--out", type=Path, default=RESULT)
    quick = (arguments := parser.parse_args()).quick
    torch.set_num_threads(1)
    seeds, sequences = ((0,), 16) if quick else ((0, 1, 2), SEQUENCES)
    content: dict[str, list] = {
        name: [] for name in ("runs", "random_allocations", "interactions", "domains")
    }
    if arguments.out.exists():
        content = json.loads(arguments.out.read_text())
    for corpus in corpora():
        for seed in seeds:
            if any((x["model"], x["seed"]) == (corpus.name, seed) for x in content["runs"]):
                continue
            began = time.monotonic()
            bench = Bench(corpus, seed, sequences, 8 if quick else HELDOUT)
            content["runs"] += bench.compare()
            content["random_allocations"].append(bench.predict(5 if quick else PAIRS))
            content["interactions"] += bench.interactions()
            print(f"{corpus.name}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)
            arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    for seed in seeds if MOE_SMALL.is_dir() else ():
        if any(x["seed"] == seed for x in content["domains"]):
            continue
        content["domains"] += compare_robust(seed, PER_DOMAIN)
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


class Bench:
    """One model, one seed: rounded weights, sensitivities and what allocations cost."""

    def __init__(self, corpus: Corpus, seed: int, sequences: int, heldout: int) -> None:
        self.corpus, self.seed = corpus, seed
        self.data = corpus.calibration_set(sequences, LENGTH, seed)
        self.model = load(corpus)
        self.table = measure(corpus, self.data, SensitivityConfig(interactions=True))
        self.without_gradient = measure(corpus, self.data, SensitivityConfig(gradient=False))
        protected = SensitivityConfig(router_weight=0.1)
        self.protected = measure(corpus, self.data, protected)
        self.rounded = {option: round_to(corpus, self.data, option) for option in OPTIONS}
        batches = corpus.heldout_batches(heldout, LENGTH)
        self.scale = Scale(self.model, batches)
        self.original = {
            name: self.model.get_submodule(name).weight.detach().clone() for name in self.table.rows
        }

    def interactions(self) -> list[dict[str, object]]:
        """Return how far errors of experts add up, layer by layer."""
        about = {"model": self.corpus.name, "seed": self.seed}
        return [
            {**about, "layer": name, "eigenvalue": found.eigenvalue, "factor": found.factor}
            for name, found in self.table.interactions.items()
        ]

    def judge(self, choice: Choice) -> dict[str, float]:
        """Judge the model with the chosen weights, and W4 where nothing was chosen."""
        with torch.no_grad():
            for name, original in self.original.items():
                option = choice.get(name, "W4A16")
                weight = self.rounded[option].get(name, original)
                self.model.get_submodule(name).weight.copy_(weight)
            result = self.scale.judge(self.model)
            for name, original in self.original.items():
                self.model.get_submodule(name).weight.copy_(original)
        return result

    def compare(self) -> list[dict[str, object]]:
        """Judge every method, unit and budget on held-out text."""
        rows = [i for i, name in enumerate(self.table.rows) if ".experts." in name]
        experts = subset(self.table, rows)
        tables = {
            "MoEQuant": experts,
            "MoEQuant, no backward pass": subset(self.without_gradient, rows),
            "MoEQuant, routers protected": subset(self.protected, rows),
        }
        tables |= self._peers(experts)
        whole = {"routed experts": tables, "all linears": {"MoEQuant": self.table}}
        for number in range(RANDOM):
            whole["routed experts"][f"random {number}"] = self._random(experts, number)
            whole["all linears"][f"random {number}"] = self._random(self.table, number)
        runs = []
        for scope, methods in whole.items():
            for method, table in methods.items():
                units = ["layer", "expert"]
                if method == "MoEQuant":
                    units += ["gate+up / down", "layer x projection", "linear"]
                for unit in units:
                    for budget in BUDGETS:
                        runs.append(self._run(scope, method, table, unit, budget))
        for budget in BUDGETS:
            for option in reversed(OPTIONS):  # the largest that fits
                choice = dict.fromkeys(experts.rows, option)
                if bits(experts, choice) <= budget:
                    runs.append(
                        self._entry("routed experts", "uniform", "layer", budget, choice, experts)
                    )
                    break
        return runs

    def _run(self, scope, method, table, unit, budget) -> dict[str, object]:
        choice = solve(table, unit, budget, per_layer=method.startswith("MC-MoE"))
        return self._entry(scope, method, unit, budget, choice, table)

    def _entry(self, scope, method, unit, budget, choice, table) -> dict[str, object]:
        return {
            "model": self.corpus.name,
            "seed": self.seed,
            "scope": scope,
            "method": method,
            "unit": unit,
            "budget": budget,
            "bits_per_weight": bits(table, choice),
            **self.judge(choice),
        }

    def _peers(self, experts: SensitivityTable) -> dict[str, SensitivityTable]:
        seen = observe(load(self.corpus), torch.tensor(self.data["input_ids"][:16]).split(8))
        layers = find_moe_layers(self.model)
        plain = [self.rounded[option] for option in OPTIONS]
        to_nearest = [nearest(self.model, experts.rows, Grid(int(o[1]), 128)) for o in OPTIONS]
        errors = {x.name: expert_errors(x, seen[x.name], plain) for x in layers}
        of_nearest = {x.name: expert_errors(x, seen[x.name], to_nearest) for x in layers}
        return {name: self._peer(experts, name, errors, of_nearest) for name in PEERS}

    def _peer(
        self,
        experts: SensitivityTable,
        method: str,
        errors: dict[str, ExpertErrors],
        of_nearest: dict[str, ExpertErrors],
    ) -> SensitivityTable:
        loss = np.zeros_like(experts.loss[:1])
        for row, name in enumerate(experts.rows):
            layer, _, rest = name.partition(".experts.")
            e, projection = int(rest.split(".")[0]), rest.split(".")[1]
            p = ("gate_proj", "up_proj", "down_proj").index(projection)
            weight = self.original[name]
            relative = [(self.rounded[o][name] - weight).norm() / weight.norm() for o in OPTIONS]
            score = PEERS[method](errors[layer], of_nearest[layer], e, p)
            loss[0, row] = torch.stack(relative).square() if score is None else score
        return replace(experts, loss=loss, domains=("calibration",))

    def _random(self, table: SensitivityTable, number: int) -> SensitivityTable:
        rng = np.random.default_rng((self.seed, number))
        loss = np.zeros_like(table.loss[:1])
        of_unit = {unit: rng.random() for unit in table.units["expert"]}
        for row, unit in enumerate(table.units["expert"]):
            loss[0, row] = [of_unit[unit] * 4.0 ** -int(option[1]) for option in OPTIONS]
        return replace(table, loss=loss, domains=("calibration",))

    def predict(self, pairs: int) -> dict[str, object]:
        """Return predicted and measured KL of random allocations of one size, layer by layer."""
        points = []
        for number in range(pairs):
            rng = np.random.default_rng((self.seed, number))
            units = sorted(set(self.table.units["layer"]))
            weight = dict(zip(units, rng.lognormal(0, 2, len(units)), strict=True))
            loss = [
                [weight[u] * 4.0 ** -int(o[1]) for o in OPTIONS] for u in self.table.units["layer"]
            ]
            table = replace(self.table, loss=np.array([loss]), domains=("random",))
            choice = solve(table, "layer", 3.0)
            points.append((predicted(self.table, choice), self.judge(choice)["kl"]))
        predicted_kl, measured = map(list, zip(*points, strict=True))
        return {
            "model": self.corpus.name,
            "seed": self.seed,
            "spearman": float(spearmanr(predicted_kl, measured).statistic),
            "predicted": predicted_kl,
            "measured": measured,
        }


# row score of each peer from: errors of ours, of rounding to nearest, expert, projection
PEERS = {
    "frequency": lambda e, _r, i, _p: e.load[i] * 4.0 ** -torch.tensor([2.0, 3, 4, 8]),
    "MC-MoE, paper": lambda e, _r, i, _p: _mc_moe(e, i, 2.0),
    "MC-MoE, released": lambda e, _r, i, _p: _mc_moe(e, i, 1.0),
    "MxMoE norm": lambda e, _r, i, p: e.linear_square[i, p].sqrt(),
    "GEMQ Fisher": lambda _e, r, i, _p: r.fisher[i] / 3,
    "ModelOpt-style": lambda e, _r, i, _p: e.fisher[i] / 3,
    "weight error (HIGGS-style)": lambda *_: None,
}


def _mc_moe(errors: ExpertErrors, expert: int, gamma: float) -> torch.Tensor:
    share = errors.load[expert] / errors.load.sum()
    return share * errors.weight[expert] ** 1.5 * errors.square[expert].sqrt() ** gamma / 3


class Scale:
    """Measures on held-out batches, against the model as it was."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
        self._batches = list(batches)
        self._reference = [model(input_ids=ids).logits.log_softmax(-1) for ids in self._batches]

    @torch.no_grad()
    def judge(self, model: nn.Module) -> dict[str, float]:
        """Return ``kl`` in nats per token, ``perplexity`` and that of the original."""
        found = []
        for ids, theirs in zip(self._batches, self._reference, strict=True):
            ours = model(input_ids=ids).logits.log_softmax(-1)
            kl = (theirs.exp() * (theirs - ours)).sum(-1).mean(1)
            losses = [-of[:, :-1].gather(2, ids[:, 1:, None]).mean((1, 2)) for of in (ours, theirs)]
            found.append(torch.stack([kl, *losses]))
        kl, loss, original = torch.cat(found, 1).mean(1).tolist()
        return {
            "kl": kl,
            "perplexity": math.exp(loss),
            "reference_perplexity": math.exp(original),
        }


def load(corpus: Corpus) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(corpus.model, dtype=torch.float32)
    linearize_moe(model)
    return model.eval()


def measure(corpus: Corpus, data: Dataset, config: SensitivityConfig) -> SensitivityTable:
    """Return the table, with the bytes of a bfloat16 checkpoint and the units named here."""
    model = AutoModelForCausalLM.from_pretrained(corpus.model, dtype=torch.float32)
    modifier = SensitivityModifier(preset="fast", options=OPTIONS, config=config)
    calibrate(model, modifier, data)
    linears = [model.get_submodule(name).bfloat16() for name in modifier.table.rows]
    options = parse_options(OPTIONS)
    units = modifier.table.units
    whole = tuple(
        name.rpartition(".")[0] if ".experts." in name else unit
        for name, unit in zip(modifier.table.rows, units["vllm"], strict=True)
    )
    return replace(
        modifier.table,
        num_bytes=np.array([[o.num_bytes(m) for o in options] for m in linears]),
        units={
            "layer": units["vllm"],
            "expert": whole,
            "gate+up / down": units["expert"],
            "layer x projection": units["gguf"],
            "linear": units["linear"],
        },
    )


def round_to(corpus: Corpus, data: Dataset, option: str) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(corpus.model, dtype=torch.float32)
    calibrate(model, MoEQuantModifier(preset="fast", scheme=option, ignore=["lm_head"]), data)
    return {
        name: module.weight.detach().clone()
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme") and isinstance(module, nn.Linear)
    }


def calibrate(model: nn.Module, modifier: object, data: Dataset) -> None:
    oneshot(
        model=model,
        recipe=modifier,
        dataset=data,
        num_calibration_samples=len(data),
        max_seq_length=LENGTH,
        batch_size=8,
    )


def subset(table: SensitivityTable, rows: Sequence[int]) -> SensitivityTable:
    return replace(
        table,
        rows=tuple(table.rows[i] for i in rows),
        loss=table.loss[:, rows],
        num_bytes=table.num_bytes[rows],
        num_weights=table.num_weights[rows],
        units={unit: tuple(labels[i] for i in rows) for unit, labels in table.units.items()},
        undercovered=(),
    )


def solve(table: SensitivityTable, unit: str, budget: float, *, per_layer: bool = False) -> Choice:
    """Allocate; ``per_layer`` gives every layer the same budget, as MC-MoE does."""
    if not per_layer:
        return dict(allocate_bits(table, BitBudget(bits_per_weight=budget), target=unit).choice)
    choice: Choice = {}
    for layer in sorted(set(table.units["layer"])):
        rows = [i for i, of in enumerate(table.units["layer"]) if of == layer]
        choice |= solve(subset(table, rows), unit, budget)
    return choice


def bits(table: SensitivityTable, choice: Choice) -> float:
    column = {option: i for i, option in enumerate(table.options)}
    total = sum(table.num_bytes[row, column[choice[name]]] for row, name in enumerate(table.rows))
    return 8 * int(total) / int(table.num_weights.sum())


def predicted(table: SensitivityTable, choice: Choice) -> float:
    column = {option: i for i, option in enumerate(table.options)}
    loss = table.loss.mean(0)
    return float(sum(loss[row, column[choice[name]]] for row, name in enumerate(table.rows)))


def compare_robust(seed: int, per_domain: int) -> list[dict[str, object]]:
    """Return held-out KL of every domain with mean and with robust allocation."""
    domains = kinds_of_text(MOE_SMALL, KINDS)
    sets = [domain.calibration_set(per_domain, LENGTH, seed) for domain in domains]
    ids = [row for data in sets for row in data["input_ids"]]
    numbers = [number for number, data in enumerate(sets) for _ in data["input_ids"]]
    data = Dataset.from_dict({"input_ids": ids, "domain": numbers})
    table = measure(
        domains[0], data, SensitivityConfig(domain_names=tuple(d.name for d in domains))
    )
    rounded = {option: round_to(domains[0], data, option) for option in OPTIONS}
    found = []
    for budget in (2.25, 2.5, 3.0):
        try:
            choices = {
                robust: allocate_bits(
                    table, BitBudget(bits_per_weight=budget), target="layer", robust=robust
                )
                for robust in (False, True)
            }
        except InfeasibleBudgetError as error:
            print(error)
            continue
        choices_of = {("robust" if r else "mean"): dict(a.choice) for r, a in choices.items()}
        uniform = max(o for o in OPTIONS if bits(table, dict.fromkeys(table.rows, o)) <= budget)
        choices_of["uniform"] = dict.fromkeys(table.rows, uniform)
        for method, choice in choices_of.items():
            model = load(domains[0])
            scales = {d.name: Scale(model, d.heldout_batches(8, LENGTH)) for d in domains}
            with torch.no_grad():
                for name, option in choice.items():
                    model.get_submodule(name).weight.copy_(rounded[option][name])
            kl = {name: scale.judge(model)["kl"] for name, scale in scales.items()}
            found.append({"seed": seed, "budget": budget, "method": method, "kl": kl})
    return found


if __name__ == "__main__":
    main()
