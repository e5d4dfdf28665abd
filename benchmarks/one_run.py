"""Quantize a model once with ``MoEQuantModifier`` and measure what that has cost it."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from corpora import Corpus
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, PreTrainedModel

from moeq_plugin import MoEQuantModifier
from moeq_plugin.models.evaluation import evaluate

LENGTH, HELDOUT = 256, 96
GRIDS = {"W4 g128": (4, 128), "W3 g128": (3, 128), "W2 g64": (2, 64)}


def one_run(
    corpus: Corpus, grid: str, seed: int, num_sequences: int, fields: Mapping[str, object]
) -> dict[str, float]:
    """Return the held-out KL divergence to the 16-bit model, perplexity and CPU seconds.

    Runs of a seed see the same calibration sequences in the same order. The time is that of the
    whole ``oneshot`` call, without loading the model.
    """
    model, cpu_s = quantized(corpus, grid, seed, num_sequences, fields)
    return {**losses(model, load(corpus), corpus), "cpu_s": cpu_s}


def quantized(
    corpus: Corpus,
    grid: str,
    seed: int,
    num_sequences: int,
    fields: Mapping[str, object],
    *,
    target: str = "Linear",
    batch_size: int = 8,
) -> tuple[PreTrainedModel, float]:
    """Return the model with rounded weights, and the CPU seconds of the ``oneshot`` call."""
    model = load(corpus)
    num_bits, group_size = GRIDS[grid]
    weights = {"num_bits": num_bits, "strategy": "group", "group_size": group_size}
    group = {"targets": [target], "weights": weights}
    dataset = corpus.calibration_set(num_sequences, LENGTH, seed)
    began = time.process_time()
    oneshot(
        model=model,
        recipe=MoEQuantModifier(config_groups={"group_0": group}, ignore=["lm_head"], **fields),
        dataset=dataset,
        num_calibration_samples=num_sequences,
        max_seq_length=LENGTH,
        shuffle_calibration_samples=False,
        batch_size=batch_size,
    )
    return model, time.process_time() - began


def losses(model: PreTrainedModel, reference: PreTrainedModel, corpus: Corpus) -> dict[str, float]:
    """Return KL divergence and perplexity on held-out text."""
    result = evaluate(model, reference, corpus.heldout_batches(HELDOUT, LENGTH))
    return {"kl": result.kl, "kl_stderr": result.kl_stderr, "perplexity": result.perplexity}


def load(corpus: Corpus) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(corpus.model, dtype=torch.float32)
