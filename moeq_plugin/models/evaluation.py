"""How far a quantized model is from the original on text that neither was calibrated on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from moeq_plugin.models.routing_agreement import (
    RoutingAgreement,
    RoutingComparison,
    compare_routing,
)
from moeq_plugin.models.stderr import mean_and_stderr, quantile_and_stderr

CHUNK = 256  # tokens whose distributions are held in float32 at a time


@dataclass(frozen=True)
class Evaluation:
    """Distances between a model and its reference; sequences count equally.

    Every ``*_stderr`` is the standard error of the number it is named after, from how sequences
    differ (tokens of one sequence are not independent); NaN for a single sequence.

    Attributes:
        perplexity: of the model.
        perplexity_stderr: its error.
        reference_perplexity: of the reference.
        reference_perplexity_stderr: its error.
        nll_change: what the model loses per token, in nats: ``ln(perplexity /
            reference_perplexity)``.
        nll_change_stderr: its error, paired: much smaller than those of the perplexities.
        kl: mean over tokens of ``KL(reference || model)``, in nats.
        kl_stderr: its error.
        kl_median: half of the tokens have no more.
        kl_median_stderr: its error.
        kl_p99: 99 % of the tokens have no more.
        kl_p99_stderr: its error.
        kl_max: of the worst token.
        top1_agreement: share of tokens where both rank the same token first.
        top1_agreement_stderr: its error.
        num_tokens: how many tokens were predicted.
        num_sequences: in how many sequences.
        routing: agreement of the routers; ``None`` unless both have the same MoE layers.
    """

    perplexity: float
    perplexity_stderr: float
    reference_perplexity: float
    reference_perplexity_stderr: float
    nll_change: float
    nll_change_stderr: float
    kl: float
    kl_stderr: float
    kl_median: float
    kl_median_stderr: float
    kl_p99: float
    kl_p99_stderr: float
    kl_max: float
    top1_agreement: float
    top1_agreement_stderr: float
    num_tokens: int
    num_sequences: int
    routing: RoutingAgreement | None


@dataclass(frozen=True)
class Distances:
    """One sequence's tokens, each field ``[tokens]``."""

    nll: torch.Tensor
    reference_nll: torch.Tensor
    kl: torch.Tensor
    agrees: torch.Tensor


@torch.no_grad()
def evaluate(
    model: nn.Module, reference: nn.Module, sequences: Iterable[torch.Tensor]
) -> Evaluation:
    """Compare two causal language models with one vocabulary, and their routers.

    One batch is held at a time; of what came before, a few numbers per token remain.

    Args:
        model: called with ``[batch, sequence]`` token ids, returns an object with ``logits``.
        reference: likewise, the model before quantization; may be on another device.
        sequences: ``[batch, sequence]`` token ids, nothing padded.

    Raises:
        ValueError: if there is no sequence, or none of two tokens.
    """
    found: list[Distances] = []
    routing = compare_routing(model, reference)
    with ExitStack() as recorders:
        if routing is not None:
            recorders.enter_context(routing.model_recorder)
            recorders.enter_context(routing.reference_recorder)
        for ids in sequences:
            found += _compare_batch(model, reference, ids, routing)
    if not found:
        raise ValueError("expected at least one sequence to evaluate on, got none")
    return summarize(found, None if routing is None else routing.result())


def _compare_batch(
    model: nn.Module, reference: nn.Module, ids: torch.Tensor, routing: RoutingComparison | None
) -> list[Distances]:
    rows, length = ids.shape
    if length < 2:
        raise ValueError(f"expected sequences of at least 2 tokens, got {length}: none to predict")
    logits = model(input_ids=ids.to(device_of(model))).logits
    # taken before the other forward: both may be one model
    ours = routing.model_recorder.take(rows) if routing is not None else None
    reference_logits = reference(input_ids=ids.to(device_of(reference))).logits
    if routing is not None and ours is not None:
        routing.add(ours, routing.reference_recorder.take(rows))
    return [_distances(*of_row) for of_row in zip(logits, reference_logits, ids, strict=True)]


def _distances(
    logits: torch.Tensor, reference_logits: torch.Tensor, ids: torch.Tensor
) -> Distances:
    """Compare the predictions of one sequence, ``[tokens, vocabulary]`` each."""
    parts: list[list[torch.Tensor]] = []
    for start in range(0, len(ids) - 1, CHUNK):
        tokens = slice(start, min(start + CHUNK, len(ids) - 1))
        theirs = reference_logits[tokens].float().log_softmax(-1)
        ours = logits[tokens].to(theirs).log_softmax(-1)
        target = ids[1:][tokens, None].to(theirs.device)
        parts.append([
            -ours.gather(1, target)[:, 0],
            -theirs.gather(1, target)[:, 0],
            (theirs.exp() * (theirs - ours)).sum(-1),
            (ours.argmax(-1) == theirs.argmax(-1)).float(),
        ])  # fmt: skip
    return Distances(*(torch.cat(of).cpu() for of in zip(*parts, strict=True)))


def summarize(found: list[Distances], routing: RoutingAgreement | None) -> Evaluation:
    """Return means over sequences and their errors.

    Args:
        found: distances of each sequence.
        routing: agreement of the routers, if it was measured.
    """
    nll, reference_nll, kl, agrees = (
        torch.stack([getattr(sequence, name).double().mean() for sequence in found])
        for name in ("nll", "reference_nll", "kl", "agrees")
    )
    tokens = [sequence.kl for sequence in found]
    return Evaluation(
        *_perplexity(nll),
        *_perplexity(reference_nll),
        *mean_and_stderr(nll - reference_nll),
        *mean_and_stderr(kl),
        *quantile_and_stderr(tokens, 0.5),
        *quantile_and_stderr(tokens, 0.99),
        max(sequence.max().item() for sequence in tokens),
        *mean_and_stderr(agrees),
        num_tokens=sum(len(sequence) for sequence in tokens),
        num_sequences=len(found),
        routing=routing,
    )


def _perplexity(nll: torch.Tensor) -> tuple[float, float]:
    mean, stderr = mean_and_stderr(nll)
    return math.exp(mean), math.exp(mean) * stderr  # d exp(x) = exp(x) dx


def device_of(model: nn.Module) -> torch.device | str:
    """Return where a model takes its inputs."""
    return next((parameter.device for parameter in model.parameters()), "cpu")
