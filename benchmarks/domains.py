"""What to calibrate on: sets of every kind, judged on every kind of held-out text.

    python benchmarks/domains.py [--seeds 3] [--models NAME ...] [--out FILE]

Writes ``benchmarks/results/domains.json`` after every run and goes on where it was stopped. All
sets of a model have the same number of tokens; the solver is the preset ``balanced`` at W3 g128.
"continued" gives the model the first 32 tokens of every sequence of "mixture" and lets it write
the rest, "sampled" only the token that starts a text, or where there is none a random one; "evened"
keeps of four times as many sampled sequences those that the least loaded experts see most of.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from corpora import KINDS, KINDS_OF_GEMMA, Corpus, corpora, dense_corpora, kinds_of_text
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moeq_plugin import MoEQuantModifier
from moeq_plugin.core.sampling import EBSSConfig
from moeq_plugin.integrations.llm_compressor.self_sampling.dataset import ebss_dataset
from moeq_plugin.models.evaluation import evaluate
from moeq_plugin.models.moe import find_moe_layers
from moeq_plugin.models.routing import RoutingRecorder

RESULT = Path(__file__).parent / "results" / "domains.json"
SEQUENCES, LENGTH, PROMPT, HELDOUT = 64, 256, 32, 16
WEIGHTS = {"num_bits": 3, "strategy": "group", "group_size": 128}
Set = Callable[[PreTrainedModel], Dataset]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--models", nargs="+", default=["moe_small", "reference_moe", "gemma3_270m"]
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    done = {(r["seed"], r["model"], r["set"]) for r in runs}
    cases = [
        (seed, corpus, name, make)
        for seed in range(arguments.seeds)
        for corpus in (*corpora(), *dense_corpora())
        if corpus.name in arguments.models
        for name, make in sets(corpus, seed)
        if (seed, corpus.name, name) not in done
    ]
    began = time.monotonic()
    for number, (seed, corpus, name, make) in enumerate(cases, 1):
        runs.append({"seed": seed, "model": corpus.name, "set": name, **run(corpus, make)})
        left = (time.monotonic() - began) / number * (len(cases) - number) / 60
        print(f"[{number}/{len(cases)}, {left:.0f} min left] {runs[-1]}", flush=True)
        content = {"sequences": SEQUENCES, "length": LENGTH, "heldout": HELDOUT, "runs": runs}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def kinds(corpus: Corpus) -> list[Corpus]:
    return kinds_of_text(corpus.model, KINDS_OF_GEMMA if corpus.is_dense else KINDS)


def sets(corpus: Corpus, seed: int) -> Iterator[tuple[str, Set]]:
    """Yield the name of every set and what makes it."""
    yield "mixture", lambda _: mixture(corpus, seed)
    yield "sampled", partial(sampled, corpus, seed, prompt=0)
    yield "continued", partial(sampled, corpus, seed, prompt=PROMPT)
    for kind in kinds(corpus):
        yield kind.name, lambda _, kind=kind: kind.calibration_set(SEQUENCES, LENGTH, seed)
    if not corpus.is_dense:
        yield "evened", partial(evened, corpus, seed)
        tokenizer = AutoTokenizer.from_pretrained(corpus.model)
        balanced = {"tau": 0.3, "num_sequences": SEQUENCES, "seq_len": LENGTH, "seed": seed}
        for name, settings in (("EBSS", {}), ("EBSS, no 4-gram twice", {"no_repeat_ngram": 4})):
            config = EBSSConfig(**balanced, **settings)
            yield name, partial(ebss_dataset, tokenizer=tokenizer, config=config)


def mixture(corpus: Corpus, seed: int) -> Dataset:
    """Return as many sequences of each kind of text, in turn."""
    parts = kinds(corpus)
    each = -(-SEQUENCES // len(parts))
    rows = [part.calibration_set(each, LENGTH, seed)["input_ids"] for part in parts]
    in_turn = [row for same_place in zip(*rows, strict=True) for row in same_place]
    return Dataset.from_dict({"input_ids": in_turn[:SEQUENCES]})


@torch.no_grad()
def sampled(
    corpus: Corpus, seed: int, model: PreTrainedModel, *, prompt: int, number: int = SEQUENCES
) -> Dataset:
    """Return what the model writes at temperature 1 after ``prompt`` tokens of text."""
    torch.manual_seed(seed)
    if prompt:
        starts = torch.tensor(mixture(corpus, seed)["input_ids"])[:, :prompt]
    elif corpus.is_dense:
        starts = torch.full((number, 1), model.config.bos_token_id)
    else:
        starts = torch.randint(2, model.config.vocab_size, (number, 1))
    ids = [
        model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=LENGTH - rows.shape[1],
            max_new_tokens=LENGTH - rows.shape[1],
        )
        for rows in starts.split(16)
    ]
    return Dataset.from_dict({"input_ids": torch.cat(ids).tolist()})


@torch.no_grad()
def evened(corpus: Corpus, seed: int, model: PreTrainedModel) -> Dataset:
    """Return sampled sequences, chosen one by one so that the sum of log loads grows fastest."""
    written = sampled(corpus, seed, model, prompt=0, number=4 * SEQUENCES)
    loads = []
    with RoutingRecorder(find_moe_layers(model)) as recorder:
        for rows in torch.tensor(written["input_ids"]).split(8):
            model(rows)
            loads.append(recorder.take_load(len(rows)))
    load = torch.cat(loads).flatten(1).float()
    chosen: list[int] = []
    total = torch.ones(load.shape[1])
    for _ in range(SEQUENCES):
        gains = (total + load).log().sum(1)
        gains[chosen] = -torch.inf
        chosen.append(int(gains.argmax()))
        total += load[chosen[-1]]
    return written.select(chosen)


def run(corpus: Corpus, make: Set) -> dict[str, object]:
    """Quantize with one set and measure on every kind of text."""
    reference = load(corpus)
    dataset = make(reference).select_columns("input_ids")
    about = {"nll_of_set": nll(reference, dataset)}
    model = load(corpus)
    oneshot(
        model=model,
        recipe=MoEQuantModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
            ignore=["lm_head"],
            preset="balanced",
        ),
        dataset=dataset,
        num_calibration_samples=SEQUENCES,
        max_seq_length=LENGTH,
        shuffle_calibration_samples=False,
        batch_size=8,
    )
    kl = {}
    for kind in kinds(corpus):
        rows = torch.cat(kind.heldout_batches(HELDOUT, LENGTH)).split(1 if corpus.is_dense else 8)
        kl[kind.name] = evaluate(model, reference, rows).kl
    return {**about, "kl": kl, "mean": statistics.mean(kl.values()), "worst": max(kl.values())}


def load(corpus: Corpus) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(corpus.model, dtype=torch.float32)


@torch.no_grad()
def nll(model: PreTrainedModel, dataset: Dataset) -> float:
    """Return the model's mean loss on a set, in nats a token: how natural the set is to it."""
    rows = torch.tensor(dataset["input_ids"]).split(2)
    return statistics.mean(model(ids, labels=ids).loss.item() for ids in rows)


if __name__ == "__main__":
    main()
