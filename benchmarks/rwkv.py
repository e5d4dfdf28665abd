"""Held-out distance to the original RWKV-7 at equal bits: who gets a codebook, and which.

    python benchmarks/rwkv.py [--quick] [--model FOLDER] [--out FILE]

Writes ``benchmarks/results/rwkv.json`` after every run and goes on where it was stopped. All runs
of one seed see the same calibration sequences, so differences are paired and their standard error
is over seeds. Models are quantized in bfloat16 and compared in float32; bits are those that the
record states, which are those of the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
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
from moeq_plugin import BitBudget, RWKVQuantModifier, SensitivityTable, allocate_bits
from moeq_plugin.core.allocation import Allocation
from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.core.uniformity import UniformityScore, score_uniformity
from moeq_plugin.integrations.llm_compressor.rwkv.modifier import DEFAULT_OPTIONS
from moeq_plugin.models.evaluation import evaluate
from moeq_plugin.models.packed import CodebookLinear, packed_modules, unpack_modules

RESULT = ROOT / "benchmarks" / "results" / "rwkv.json"
SEQUENCES, LENGTH, HELDOUT, SEEDS = 16, 128, 32, (0, 1, 2)
GRIDS = ("W2A16_G32", "W3A16_G64", "W4A16_G64", "W8A16_G64", "UNQUANTIZED")
# budget: what may be taken per weight, the grid and the codebook that come nearest to it
BUDGETS = {
    "2.5": (2.55, {"num_bits": 2, "symmetric": False, "group_size": 32}, (5, 2, 256, 64)),
    "3.25": (3.25, {"num_bits": 3, "symmetric": False, "group_size": 64}, (6, 2, 64, 64)),
}
W3 = {"num_bits": 3, "symmetric": False, "group_size": 64}
# all weights in one format: bits per index, columns per index, rows and columns of a codebook
FORMATS = (
    (4, 2, 64, 32), (5, 2, 128, 64), (5, 2, 256, 64), (6, 2, 64, 32), (6, 2, 128, 64),
    (6, 2, 256, 64), (7, 2, 128, 128), (7, 2, 512, 64),
)  # fmt: skip
TABLES = ("choice", "formats", "elementwise", "rules")  # the most wanted first
ELEMENTWISE = CodebookFormat(3, 1, group_rows=1, group_columns=64)
Scorer = Callable[[str, torch.Tensor], float | UniformityScore]


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to do to the model.

    Attributes:
        table: of the page that it belongs to.
        budget: likewise its row, with the method.
        method: likewise.
        make: returns the modifier; what it asks for is made when it is needed.
    """

    table: str
    budget: str
    method: str
    make: Callable[[], RWKVQuantModifier]


def kurtosis(_name: str, weight: torch.Tensor) -> float:
    centered = weight - weight.mean()
    return (centered**4).mean().item() / centered.square().mean().item() ** 2


def incoherence(_name: str, weight: torch.Tensor) -> float:
    return weight.abs().max().item() * weight.numel() ** 0.5 / weight.norm().item()


def distinct_gaps(_name: str, weight: torch.Tensor) -> UniformityScore:
    """Return the proxy that the published thresholds belong to."""
    return score_uniformity(weight.half(), "unique")


class RankedBy(RWKVQuantModifier):
    """The modifier with another ranking; the largest get codebooks."""

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


def in_one_format(form: tuple[int, ...], **arguments: Any) -> RWKVQuantModifier:
    return RWKVQuantModifier(scalar_frac=0.0, codebook=CodebookFormat(*form), **arguments)


def on_a_grid(weights: Mapping[str, Any], preset: str) -> RWKVQuantModifier:
    group = {"targets": ["Linear"], "weights": {**weights, "strategy": "group"}}
    return RWKVQuantModifier(config_groups={"grid": group}, scalar_frac=1.0, preset=preset)


def cases(seed: int, measured: Callable[[], SensitivityTable], folder: Path) -> Iterator[Case]:
    """Yield what is compared, the most wanted first."""
    for budget, (bits, weights, form) in BUDGETS.items():
        yield from choices(budget, bits, weights, form, seed, measured, folder)
    yield from (
        Case("formats", "", f"W3 group 64, {preset}", lambda p=preset: on_a_grid(W3, p))
        for preset in ("fast", "balanced")
    )
    for form in FORMATS:
        name = "codebook {}/{} in {} x {}".format(*form)
        yield Case("formats", "", name, lambda f=form: in_one_format(f))
    form = BUDGETS["3.25"][2]
    ways: dict[str, dict[str, Any]] = {
        "unweighted": {"elementwise_weighted": False},
        "weighted": {},
        "weighted, no clipping": {"elementwise_percentile": 100},
    }
    for name, way in ways.items():
        yield Case(
            "elementwise",
            "3.25",
            name,
            lambda way=way: in_one_format(form, elementwise=ELEMENTWISE, **way),
        )
    yield from rules(seed)


def choices(
    budget: str,
    bits: float,
    weights: Mapping[str, Any],
    form: tuple[int, ...],
    seed: int,
    measured: Callable[[], SensitivityTable],
    folder: Path,
) -> Iterator[Case]:
    """Yield ways to choose formats under one budget."""

    def allocated(options: tuple[str, ...], *, by_chance: bool = False) -> RWKVQuantModifier:
        table = with_options(measured(), options)
        found = allocate_bits(table, BitBudget(bits_per_weight=bits), target="linear")
        if by_chance:
            found = drawn(table, found, seed)
        path = folder / f"{budget}-{seed}-{len(options)}-{by_chance}.json"
        found.save(path)
        return RWKVQuantModifier(allocation=str(path))

    group = {"targets": ["Linear"], "weights": {**weights, "strategy": "group"}}
    mixed = {"config_groups": {"grid": group}, "codebook": CodebookFormat(*form)}
    both = tuple(dict.fromkeys((*DEFAULT_OPTIONS, *GRIDS[:2])))
    made: dict[str, Callable[[], RWKVQuantModifier]] = {
        "GPTQ, searched ranges": lambda: on_a_grid(weights, "balanced"),
        "one codebook for all": lambda: in_one_format(form),
        "measured, codebooks and grids": lambda: allocated(both),
        "measured, grids only": lambda: allocated(GRIDS),
        "chance, codebooks and grids": lambda: allocated(both, by_chance=True),
        "proxy, one of ten in a codebook": lambda: RWKVQuantModifier(**mixed),
    }
    yield from (Case("choice", budget, name, make) for name, make in made.items())


def rules(seed: int) -> Iterator[Case]:
    """Yield rules that need no data, at the second budget."""
    budget = "3.25"
    _, weights, form = BUDGETS[budget]
    group = {"targets": ["Linear"], "weights": {**weights, "strategy": "group"}}
    common = {"config_groups": {"grid": group}, "codebook": CodebookFormat(*form)}
    scorers: dict[str, Scorer] = {
        "variance": lambda _name, w: w.var().item(),
        "range": lambda _name, w: (w.max() - w.min()).item(),
        "kurtosis": kurtosis,
        "incoherence": incoherence,
        "chance": lambda name, _w: random.Random(f"{seed} {name}").random(),
    }
    for name, scorer in scorers.items():
        yield Case("rules", budget, name, lambda s=scorer: ranked_by(s, **common))
    for name, scorer, thresholds in (
        ("published thresholds", distinct_gaps, (1.54, 30.0)),
        ("released rule (incoherence > 8)", incoherence, (8.0, 8.0)),
    ):
        yield Case(
            "rules",
            budget,
            name,
            lambda s=scorer, t=thresholds: ranked_by(s, **common, thresholds=t),
        )


def with_options(table: SensitivityTable, options: tuple[str, ...]) -> SensitivityTable:
    """Return the part of a table that is about these options."""
    columns = [table.options.index(option) for option in options]
    return dataclasses.replace(
        table,
        options=options,
        loss=table.loss[:, :, columns],
        num_bytes=table.num_bytes[:, columns],
    )


def drawn(table: SensitivityTable, like: Allocation, seed: int) -> Allocation:
    """Return an allocation that spends the same bytes without looking at losses.

    From the smallest options on, linears are drawn and get their next larger option, until none
    fits any more.
    """
    rng, rows = random.Random(seed), range(len(table.rows))
    ranked = table.num_bytes.argsort(1)
    place = [0 for _ in rows]

    def size(row: int, place: int) -> int:
        return int(table.num_bytes[row, ranked[row, place]])

    total, open_rows = sum(size(row, 0) for row in rows), list(rows)
    while open_rows:
        row = rng.choice(open_rows)
        more = size(row, place[row] + 1) - size(row, place[row])
        if more > like.limit_bytes - total or place[row] + 2 == len(table.options):
            open_rows.remove(row)  # not to 16 bit: that is where bytes are wasted by any rule
            continue
        total, place[row] = total + more, place[row] + 1
    chosen = [int(ranked[row, place[row]]) for row in rows]
    choice = {name: table.options[o] for name, o in zip(table.rows, chosen, strict=True)}
    bits = 8 * total / int(table.num_weights.sum())
    return dataclasses.replace(like, choice=choice, num_bytes=total, bits_per_weight=bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, a few sequences")
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "assets" / "tiny_rwkv")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus = load_corpus(arguments.model)
    seeds, sequences, heldout = ((0,), 4, 8) if arguments.quick else (SEEDS, SEQUENCES, HELDOUT)
    asked = {"model": corpus.name, "sequences": sequences, "length": LENGTH, "heldout": heldout}
    content: dict[str, Any] = {**asked, "runs": []}
    if arguments.out.is_file():
        before = json.loads(arguments.out.read_text())
        if {name: before.get(name) for name in asked} == asked:
            content = before
    batches = corpus.heldout_batches(heldout, LENGTH)
    reference = Remembered(load(corpus.model).float(), batches)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tables = {seed: Measured(corpus, sequences, seed) for seed in seeds}
        # seed by seed within a kind of table, so that what is there first is whole
        plan = [(c, s) for s in seeds for c in cases(s, tables[s], Path(folder))]
        plan.sort(
            key=lambda item: ("choice", "formats", "elementwise", "rules").index(item[0].table)
        )
        done = {(r["table"], r["budget"], r["method"], r["seed"]) for r in content["runs"]}
        for case, seed in plan:
            if (case.table, case.budget, case.method, seed) in done:
                continue
            model = load(corpus.model)
            modifier = case.make()
            quantize(model, modifier, corpus, sequences, seed)
            described = describe(model, modifier)
            unpack_modules(model)
            found = evaluate(model.float().eval(), reference, batches)
            of = {"table": case.table, "budget": case.budget, "method": case.method, "seed": seed}
            content["runs"].append({**of, **described, **distances(found)})
            print(f"{time.monotonic() - began:.0f} s {content['runs'][-1]}", flush=True)
            arguments.out.write_text(json.dumps(content, indent=1) + "\n")


class Measured:
    """The losses of all options on one seed's data, measured when they are first asked for."""

    def __init__(self, corpus: Corpus, sequences: int, seed: int) -> None:
        self._of = corpus, sequences, seed
        self._table: SensitivityTable | None = None

    def __call__(self) -> SensitivityTable:
        """Return the table."""
        if self._table is None:
            corpus, sequences, seed = self._of
            options = list(dict.fromkeys((*DEFAULT_OPTIONS, *GRIDS)))
            modifier = RWKVQuantModifier(options=options).sensitivity_modifier()
            quantize(load(corpus.model), modifier, corpus, sequences, seed)
            self._table = modifier.table
        return self._table


def load_corpus(model: Path) -> Corpus:
    """Return the model with the text that it was not trained on and some that it was."""
    assets = ROOT / "examples" / "assets"
    calibration, heldout = (
        (assets / f"{name}.txt").read_text().split(SEPARATOR) for name in ("calibration", "heldout")
    )
    return Corpus(model.name, model, calibration, heldout)


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


class Remembered(nn.Module):
    """A model that has run already on the only batches that it will see."""

    def __init__(self, model: nn.Module, batches: list[torch.Tensor]) -> None:
        super().__init__()
        with torch.no_grad():
            self._logits = {batch: model(input_ids=batch).logits for batch in batches}

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        """Return what the model has returned."""
        return SimpleNamespace(logits=self._logits[input_ids])


def quantize(model: Any, modifier: Any, corpus: Corpus, sequences: int, seed: int) -> None:
    oneshot(
        model=model,
        recipe=modifier,
        dataset=corpus.calibration_set(sequences, LENGTH, seed),
        num_calibration_samples=sequences,
        max_seq_length=LENGTH,
        shuffle_calibration_samples=False,
        batch_size=8,
    )


def distances(found: Any) -> dict[str, float]:
    names = ("kl", "kl_stderr", "perplexity", "reference_perplexity")
    return {name: getattr(found, name) for name in names}


def describe(model: Any, modifier: RWKVQuantModifier) -> dict[str, Any]:
    """Return the bits that quantized weights take, and how many linears have which format."""
    schemes = [record.scheme for record in modifier.record.linears]
    coded = [m for m in packed_modules(model).values() if isinstance(m, CodebookLinear)]
    return {
        "bits_per_weight": bits_of_all(modifier),
        "num_linears": len(schemes),
        "num_codebook": len(coded),
        "schemes": {scheme: schemes.count(scheme) for scheme in sorted(set(schemes))},
    }


def bits_of_all(modifier: RWKVQuantModifier) -> float:
    """Return the bits per weight of all linears that are chosen for, those in 16 bit among them."""
    if modifier.allocation is not None:
        return Allocation.load(modifier.allocation).bits_per_weight
    found = modifier.record.bits_per_weight
    assert found is not None
    return found


if __name__ == "__main__":
    main()
