"""EBSS: how fast it samples, and whether the sets it samples calibrate better.

    python benchmarks/ebss.py {speed,quality} [--quick]

Writes its part of ``benchmarks/results/ebss.json`` after every case. Speed is in CPU time and
paired: every method of a round starts from the same tokens and extends the same number of
branches, and rounds are repeated in one process. Quality: all sets of a seed have the same number
of tokens and are judged by the held-out distance to the original after quantization. The imbalance
of a set is always measured the same way, with one forward over its tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")

import torch
from corpora import Corpus, corpora
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moeq_plugin import MoEQuantModifier
from moeq_plugin.core.sampling import EBSSConfig, expert_imbalance
from moeq_plugin.integrations.llm_compressor.self_sampling.dataset import ebss_dataset
from moeq_plugin.models.evaluation import evaluate
from moeq_plugin.models.moe import find_moe_layers
from moeq_plugin.models.routing import RoutingRecorder, weight_sums
from moeq_plugin.records.sampling import distinct_ngrams

RESULT = Path(__file__).parent / "results" / "ebss.json"
SEQUENCES, LENGTH, HELDOUT = 32, 256, 48
SPEED_SEQUENCES, SPEED_LENGTH, SPEED_ROUNDS = (16, 64, 128), 512, 3
BEAM = 4
SAMPLED: dict[str, dict[str, object]] = {
    "ancestral": {},
    "beam, tau inf": {"tau": math.inf},
    "EBSS, tau 1.2": {"tau": 1.2},
    "EBSS, tau 0.3": {"tau": 0.3},
    "EBSS, tau 0.05": {"tau": 0.05},
    "EBSS, tau 1.2, no 4-gram twice, global": {
        "tau": 1.2,
        "no_repeat_ngram": 4,
        "global_balance": True,
    },
}
Set = Callable[[PreTrainedModel], Dataset]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("speed", "quality"))
    parser.add_argument("--quick", action="store_true", help="one seed, a few short sequences")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    quick, part = arguments.quick, arguments.part
    torch.set_num_threads(1)
    seeds, sequences, heldout = ((0,), 8, 16) if quick else ((0, 1, 2), SEQUENCES, HELDOUT)
    about = {"sequences": sequences, "length": LENGTH, "heldout": heldout, "threads": 1}
    cases = {
        "speed": [
            partial(measure_speed, corpus, rows, quick)
            for corpus in corpora()
            for rows in SPEED_SEQUENCES
        ],
        "quality": [
            partial(measure_quality, corpus, seed, name, make, heldout)
            for corpus in corpora()
            for seed in seeds
            for name, make in sets(corpus, seed, sequences)
        ],
    }[part]
    found: list[dict[str, object]] = []
    began = time.monotonic()
    for done, case in enumerate(cases, 1):
        found += case()
        left = (time.monotonic() - began) / done * (len(cases) - done)
        print(f"[{done}/{len(cases)}, {left / 60:.0f} min left] {found[-1]}", flush=True)
        content = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        content |= {part: {**(about if part == "quality" else {}), "runs": found}}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def load(corpus: Corpus) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(corpus.model, dtype=torch.float32)


def sets(corpus: Corpus, seed: int, sequences: int) -> Iterator[tuple[str, Set]]:
    """Yield the name of every set and what makes it."""
    tokenizer = AutoTokenizer.from_pretrained(corpus.model)
    yield "natural text", lambda _: corpus.calibration_set(sequences, LENGTH, seed)
    yield "random tokens", lambda _: random_tokens(len(tokenizer), sequences, seed)
    for name, settings in SAMPLED.items():
        config = EBSSConfig(num_sequences=sequences, seq_len=LENGTH, seed=seed, **settings)
        yield name, partial(ebss_dataset, tokenizer=tokenizer, config=config)


def random_tokens(vocabulary: int, sequences: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocabulary, (sequences, LENGTH), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist()})


def measure_quality(
    corpus: Corpus, seed: int, name: str, make: Set, heldout: int
) -> list[dict[str, object]]:
    """Make a set, describe it and quantize with it to 4 and to 3 bits."""
    reference = load(corpus)
    began = time.monotonic()
    dataset = make(reference).select_columns("input_ids")
    seconds = time.monotonic() - began
    about = {"model": corpus.name, "set": name, "seed": seed, "seconds": seconds}
    about |= describe(reference, list(dataset["input_ids"]))
    return [{**about, **quantize(corpus, reference, dataset, b, heldout)} for b in (4, 3)]


@torch.no_grad()
def describe(model: PreTrainedModel, rows: list[list[int]]) -> dict[str, float]:
    """Return imbalance, coverage, likelihood and repetition of token ids."""
    layers, losses, loads = find_moe_layers(model), [], []
    with RoutingRecorder(layers) as recorder:
        for ids in torch.tensor(rows).split(8):
            log_probs = model(ids).logits[:, :-1].log_softmax(-1)
            losses.append(-log_probs.gather(2, ids[:, 1:, None]).mean((1, 2)))
            loads.append(recorder.take_load(len(ids)))
    load_of_rows = torch.cat(loads)
    sums = weight_sums(model, layers, rows)
    return {
        "imbalance": expert_imbalance(load_of_rows.sum(0), len(rows) * LENGTH).item(),
        "sequence_imbalance": expert_imbalance(load_of_rows, LENGTH).mean().item(),
        "min_load": load_of_rows.sum(0).min().item(),
        "min_effective_tokens": (sums[0] ** 2 / sums[1]).nan_to_num(0).min().item(),
        "perplexity_of_set": math.exp(torch.cat(losses).mean().item()),
        "distinct_4gram": statistics.median(distinct_ngrams(ids, 4) for ids in rows),
    }


def quantize(
    corpus: Corpus, reference: PreTrainedModel, dataset: Dataset, num_bits: int, heldout: int
) -> dict[str, object]:
    """Quantize with the set and measure on held-out text."""
    model = load(corpus)
    weights = {"num_bits": num_bits, "strategy": "group", "group_size": 128}
    group = {"targets": ["Linear"], "weights": weights}
    oneshot(
        model=model,
        recipe=MoEQuantModifier(
            preset="fast", config_groups={"group_0": group}, ignore=["lm_head"]
        ),
        dataset=dataset,
        num_calibration_samples=len(dataset),
        max_seq_length=LENGTH,
        batch_size=8,
    )
    result = evaluate(model, reference, corpus.heldout_batches(heldout, LENGTH))
    return {
        "num_bits": num_bits,
        "kl": result.kl,
        "kl_stderr": result.kl_stderr,
        "perplexity": result.perplexity,
        "reference_perplexity": result.reference_perplexity,
        "top1_agreement": result.top1_agreement,
    }


@torch.no_grad()
def measure_speed(corpus: Corpus, rows: int, quick: bool) -> list[dict[str, object]]:
    """Time the same beam search of Hugging Face and of this package, and the forwards alone."""
    length, rounds = (64, 1) if quick else (SPEED_LENGTH, SPEED_ROUNDS)
    model, found = load(corpus), []
    model.generation_config.eos_token_id = None
    for number in range(rounds):
        base = EBSSConfig(num_sequences=rows, seq_len=length, seed=number, prefix_tokens=0)
        settings = {**vars(base), "beam_width": BEAM, "tau": math.inf}
        ours = partial(ebss_dataset, model, max_cached_tokens=2**30)
        seconds, unguided = timed(partial(ours, config=EBSSConfig(**settings)))
        seconds_guided, _ = timed(partial(ours, config=EBSSConfig(**{**settings, "tau": 0.3})))
        start = torch.tensor([ids[:1] for ids in unguided["input_ids"]])
        seconds_hf, theirs = timed(partial(generate, model, start, length))
        seconds_forward, _ = timed(partial(forward_only, model, start, length))
        tokens = rows * length
        equal = [a == b for a, b in zip(unguided["input_ids"], theirs, strict=True)]
        found.append(
            {
                "model": corpus.name,
                "round": number,
                "sequences": rows,
                "length": length,
                "branches": BEAM,
                "tokens_per_s": tokens / seconds,
                "tokens_per_s_guided": tokens / seconds_guided,
                "tokens_per_s_generate": tokens / seconds_hf,
                "tokens_per_s_forward_only": tokens / seconds_forward,
                "times_generate": seconds_hf / seconds_guided,
                "times_forward_only": seconds_forward / seconds_guided,
                "equal_to_generate": statistics.fmean(equal),
            }
        )
    return found


def timed(call: Callable[[], object]) -> tuple[float, object]:
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


def generate(model: PreTrainedModel, start: torch.Tensor, length: int) -> list[list[int]]:
    ids = model.generate(
        start,
        num_beams=BEAM,
        do_sample=False,
        length_penalty=1.0,
        max_new_tokens=length - start.shape[1],
        pad_token_id=0,
    )
    return ids.tolist()


def forward_only(model: PreTrainedModel, start: torch.Tensor, length: int) -> None:
    """Feed as many rows for as many steps with the cache of the model, without a search."""
    rows, cache = start.repeat_interleave(BEAM, 0), None
    for _ in range(length):
        output = model(input_ids=rows, past_key_values=cache, use_cache=True)
        rows, cache = output.logits[:, -1:].argmax(-1), output.past_key_values


if __name__ == "__main__":
    main()
