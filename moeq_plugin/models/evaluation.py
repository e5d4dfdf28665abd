"""How far a quantized model is from the original on text that neither was calibrated on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Evaluation:
    """Distances between a model and its reference; sequences count equally.

    Attributes:
        perplexity: of the model.
        reference_perplexity: of the reference.
        kl: mean over tokens of ``KL(reference || model)``, in nats.
        kl_stderr: its standard error, from the means of the sequences (tokens of one sequence
            are not independent).
        top1_agreement: share of tokens where both rank the same token first.
        num_tokens: how many tokens were predicted.
    """

    perplexity: float
    reference_perplexity: float
    kl: float
    kl_stderr: float
    top1_agreement: float
    num_tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module, reference: nn.Module, sequences: Iterable[torch.Tensor]
) -> Evaluation:
    """Compare two causal language models with one vocabulary.

    Args:
        model: called with ``[batch, sequence]`` token ids, returns an object with ``logits``.
        reference: likewise, the model before quantization.
        sequences: ``[batch, sequence]`` token ids, nothing padded.

    Raises:
        ValueError: if there is no sequence.
    """
    losses, reference_losses, divergences, agreements = [], [], [], []
    num_tokens = 0
    for ids in sequences:
        ours = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
        theirs = reference(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
        target = ids[:, 1:, None]
        losses.append(-ours.gather(2, target).mean((1, 2)))
        reference_losses.append(-theirs.gather(2, target).mean((1, 2)))
        divergences.append((theirs.exp() * (theirs - ours)).sum(-1).mean(1))
        agreements.append((ours.argmax(-1) == theirs.argmax(-1)).float().mean(1))
        num_tokens += target.numel()
    if not losses:
        raise ValueError("expected at least one sequence to evaluate on, got none")
    kl = torch.cat(divergences).double()
    return Evaluation(
        perplexity=math.exp(torch.cat(losses).double().mean().item()),
        reference_perplexity=math.exp(torch.cat(reference_losses).double().mean().item()),
        kl=kl.mean().item(),
        kl_stderr=kl.std().item() / math.sqrt(len(kl)) if len(kl) > 1 else math.nan,
        top1_agreement=torch.cat(agreements).mean().item(),
        num_tokens=num_tokens,
    )
