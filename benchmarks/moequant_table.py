"""The ablation of MoEQuant (arXiv:2505.03804): rounding x calibration text x affinity power.

    python benchmarks/moequant_table.py [--quick]
    python benchmarks/moequant_table.py --model Qwen/Qwen3-30B-A3B --calibration FILE --heldout FILE

Without a model: the models at hand, into ``benchmarks/results/moequant_table.json``. Cases found
there are not run again (delete the file to start over). With one: any Mixture-of-Experts model of
transformers, calibrated on and measured against documents of text files, separated by the
character 0x1E; ``--sequences 128 --length 2048`` is the paper's size. All cases of a seed share
their data, so differences are paired. Affinity power 0 is the plain method on routed tokens, 1 the
paper's; rounding to nearest sees no data. Beside natural text and the paper's guided search (EBSS)
there is text that the model writes unguided, which is our default where no data are given.
For our models llm-compressor's own AWQ, clipping behind ours and GPTQ on the grids of the host's
MSE observer stand beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from compressed_tensors.offload import remove_dispatch
from corpora import SEPARATOR, Corpus, corpora
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moeq_plugin import (
    EBSSConfig,
    MoEQuantAWQModifier,
    MoEQuantModifier,
    ebss_dataset,
    evaluate,
)
from moeq_plugin.integrations.llm_compressor import ResidualRotationModifier
from moeq_plugin.integrations.llm_compressor.host import without_pinning

RESULT = Path(__file__).parent / "results" / "moequant_table.json"
IGNORE = ["lm_head", "re:.*gate$", "re:.*router$"]
GRIDS = {
    f"W{bits} {name}": {"num_bits": bits, **grid}
    for bits in (4, 3)
    for name, grid in (
        ("channel", {"strategy": "channel"}),
        ("g128", {"strategy": "group", "group_size": 128}),
    )
}
TEXTS = ("natural text", "EBSS", "sampled")
POWERS = (0.0, 1.0, 2.0)
Modifiers = Callable[[float, dict[str, object]], list[object]]
METHODS: dict[str, Modifiers] = {
    "RTN": lambda _, scheme: [QuantizationModifier(**scheme)],
    "GPTQ": lambda power, scheme: [MoEQuantModifier(preset="fast", affinity_power=power, **scheme)],
    "GPTQ, ranges by MSE": lambda power, scheme: [
        MoEQuantModifier(
            preset="fast", affinity_power=power, weight_observer="memoryless_mse", **scheme
        )
    ],
    "AWQ": lambda power, scheme: [
        MoEQuantAWQModifier(affinity_power=power),
        QuantizationModifier(**scheme),
    ],
    "AWQ, llm-compressor": lambda _, scheme: [AWQModifier(), QuantizationModifier(**scheme)],
    "AWQ, clipped": lambda power, scheme: [
        MoEQuantAWQModifier(affinity_power=power, clip=True),
        QuantizationModifier(**scheme),
    ],
    "rotated GPTQ": lambda power, scheme: [
        ResidualRotationModifier(),
        MoEQuantModifier(preset="fast", affinity_power=power, **scheme),
    ],
}


@dataclass(frozen=True)
class Case:
    """One cell of the table for one seed; RTN sees no data, so it has no text, power or seed."""

    model: str
    grid: str
    method: str
    text: str | None = None
    power: float | None = None
    seed: int | None = None


def main() -> None:
    arguments = read_arguments()
    torch.set_num_threads(1)
    seeds = (0,) if arguments.quick else (0, 1, 2)
    sizes = {name: getattr(arguments, name) for name in ("sequences", "length", "heldout_windows")}
    runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    there = {Case(**{key: run[key] for key in Case.__dataclass_fields__}) for run in runs}
    for corpus in chosen_corpora(arguments):
        table = Table(corpus, **sizes)
        cases = [case for case in cases_of(corpus, table.grids(), seeds) if case not in there]
        began = time.monotonic()
        for done, case in enumerate(cases, 1):
            runs.append({**asdict(case), **table.run(case)})
            left = (time.monotonic() - began) / done * (len(cases) - done)
            print(f"[{done}/{len(cases)}, {left / 60:.0f} min left] {runs[-1]}", flush=True)
            arguments.out.write_text(json.dumps({**sizes, "runs": runs}, indent=1) + "\n")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="directory or Hugging Face model id")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on, for --model")
    parser.add_argument("--heldout", type=Path, help="text to measure on, for --model")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--heldout-windows", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    given = [arguments.model, arguments.calibration, arguments.heldout]
    if any(given) and (not all(given) or arguments.out == RESULT):
        parser.error("--model needs --calibration, --heldout and an --out of its own")
    return arguments


def chosen_corpora(arguments: argparse.Namespace) -> list[Corpus]:
    if not arguments.model:
        return corpora()
    texts = [f.read_text().split(SEPARATOR) for f in (arguments.calibration, arguments.heldout)]
    return [Corpus(arguments.model, arguments.model, *texts)]


def cases_of(corpus: Corpus, grids: list[str], seeds: tuple[int, ...]) -> Iterator[Case]:
    """Yield all cases, seed by seed, so that an interrupted table has whole seeds."""
    for grid in grids:
        yield Case(corpus.name, grid, "RTN")
    # beside the paper's table, on one text of our models
    texts = TEXTS[:1] if isinstance(corpus.model, Path) else ()
    others = {
        "RTN": ((), ()),
        "GPTQ, ranges by MSE": (texts, POWERS),
        "AWQ, llm-compressor": (texts, (None,)),
        "AWQ, clipped": (texts, POWERS),
    }
    for seed, grid, method in itertools.product(seeds, grids, METHODS):
        for text, power in itertools.product(*others.get(method, (TEXTS, POWERS))):
            yield Case(corpus.name, grid, method, text, power, seed)


class Table:
    """One model, its held-out text and its calibration sets, each made once."""

    def __init__(self, corpus: Corpus, sequences: int, length: int, heldout_windows: int) -> None:
        self.corpus, self.sequences, self.length = corpus, sequences, length
        self.heldout = corpus.heldout_batches(heldout_windows, length)
        self.reference = self._load()
        self.calibration = cache(self._calibration)

    def _load(self) -> PreTrainedModel:
        dtype = torch.float32 if isinstance(self.corpus.model, Path) else "auto"
        return AutoModelForCausalLM.from_pretrained(self.corpus.model, dtype=dtype)

    def grids(self) -> list[str]:
        """Return all grids, without groups where one spans every row: the channels are those."""
        weights = [w for w in self.reference.parameters() if w.dim() > 1]
        one_group = all(weight.shape[-1] <= 128 for weight in weights)
        return [name for name in GRIDS if not (one_group and name.endswith("g128"))]

    def run(self, case: Case) -> dict[str, float]:
        """Quantize once and measure on held-out text."""
        model = self._load()
        group = {"targets": ["Linear"], "weights": {"symmetric": True, **GRIDS[case.grid]}}
        scheme = {"config_groups": {"group_0": group}, "ignore": IGNORE}
        data: dict[str, object] = {}
        if case.seed is not None:
            data = {
                "dataset": self.calibration(case.text, case.seed),
                "num_calibration_samples": self.sequences,
                "max_seq_length": self.length,
                "batch_size": 8,
            }
        with without_pinning():  # llm-compressor's AWQ fails without an accelerator otherwise
            oneshot(model=model, recipe=METHODS[case.method](case.power or 0.0, scheme), **data)
        result = evaluate(model, self.reference, self.heldout)
        remove_dispatch(model).to("meta")  # the host keeps every model that it has quantized
        return {
            "kl": result.kl,
            "kl_stderr": result.kl_stderr,
            "perplexity": result.perplexity,
            "reference_perplexity": result.reference_perplexity,
            "top1_agreement": result.top1_agreement,
            "routing_agreement": result.routing.jaccard if result.routing else None,
        }

    def _calibration(self, text: str, seed: int) -> Dataset:
        if text == "natural text":
            return self.corpus.calibration_set(self.sequences, self.length, seed)
        tau = 1.2 if text == "EBSS" else None  # the paper's; None samples token by token
        config = EBSSConfig(
            num_sequences=self.sequences, seq_len=self.length, tau=tau, beam_width=4, seed=seed
        )
        tokenizer = AutoTokenizer.from_pretrained(self.corpus.model)
        return ebss_dataset(self.reference, tokenizer, config).select_columns("input_ids")


if __name__ == "__main__":
    main()
