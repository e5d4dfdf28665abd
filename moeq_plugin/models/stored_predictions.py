"""What a model predicts, kept so that it need not be in memory beside the one compared with it.

At every position its likeliest tokens are kept one by one, and the mass of all others by what is
left when their number is divided by that of the groups. The KL divergence over that partition is
never more than the true one, and equal to it where no group has two tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from moeq_plugin.models.evaluation import CHUNK, Distances, Evaluation, device_of, summarize

TOP_K, GROUPS = 512, 512


@dataclass(frozen=True)
class Predictions:
    """Predictions of the next token; the last token of a sequence has none.

    Attributes:
        top: ``[sequences, tokens - 1, k]`` ids of the likeliest tokens, the likeliest first.
        log_probs: their log-probabilities, likewise.
        log_rest: ``[sequences, tokens - 1, groups]``, log of the mass of the other tokens of each
            group, those whose ids leave the same when divided by the number of groups.
        nll: ``[sequences, tokens - 1]``, of the token that follows.
    """

    top: torch.Tensor
    log_probs: torch.Tensor
    log_rest: torch.Tensor
    nll: torch.Tensor


@torch.no_grad()
def predict(
    model: nn.Module, sequences: Iterable[torch.Tensor], k: int = TOP_K, groups: int = GROUPS
) -> Predictions:
    """Return what a causal language model predicts.

    Args:
        model: called with ``[batch, sequence]`` token ids, returns an object with ``logits``.
        sequences: ``[batch, sequence]`` token ids, all of one length, nothing padded.
        k: tokens that are kept at each position, at most.
        groups: that all others are divided into.

    Raises:
        ValueError: if there is no sequence.
    """
    rows: list[list[torch.Tensor]] = []
    for ids in sequences:
        logits = model(input_ids=ids.to(device_of(model))).logits
        rows += [_kept(*of, k, groups) for of in zip(logits, ids, strict=True)]
    if not rows:
        raise ValueError("expected at least one sequence, got none")
    return Predictions(*(torch.stack(of) for of in zip(*rows, strict=True)))


def _kept(logits: torch.Tensor, ids: torch.Tensor, k: int, groups: int) -> list[torch.Tensor]:
    """Return what is kept of one sequence, in the order of :class:`Predictions`."""
    parts: list[list[torch.Tensor]] = []
    for tokens in _chunks(len(ids)):
        log_probs = logits[tokens].float().log_softmax(-1)
        best, top = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
        target = ids[1:][tokens, None].to(log_probs.device)
        parts.append(
            [top.int(), best, _log_rest(log_probs, top, groups), -log_probs.gather(1, target)[:, 0]]
        )
    return [torch.cat(of).cpu() for of in zip(*parts, strict=True)]


def _chunks(num_tokens: int) -> Iterable[slice]:
    for start in range(0, num_tokens - 1, CHUNK):
        yield slice(start, min(start + CHUNK, num_tokens - 1))


def _log_rest(log_probs: torch.Tensor, top: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the log of the mass of each group without ``top``; added up, as 1 - x is noise."""
    others = log_probs.scatter(1, top, -torch.inf)
    missing = -others.shape[-1] % groups
    padded = nn.functional.pad(others, (0, missing), value=-torch.inf)
    return padded.view(len(others), -1, groups).logsumexp(1)


@torch.no_grad()
def compare_with(
    stored: Predictions, model: nn.Module, sequences: Iterable[torch.Tensor]
) -> Evaluation:
    """Compare a model with what its reference predicted; routers are not compared.

    Args:
        stored: of the reference.
        model: called with ``[batch, sequence]`` token ids, returns an object with ``logits``.
        sequences: what the reference saw.

    Raises:
        ValueError: if these are not as many.
    """
    found: list[Distances] = []
    number = 0
    for ids in sequences:
        logits = model(input_ids=ids.to(device_of(model))).logits
        for of_row, row in zip(logits, ids, strict=True):
            if number < len(stored.top):
                found.append(_distances(stored, number, of_row, row))
            number += 1
    if number != len(stored.top):
        raise ValueError(f"{len(stored.top)} sequences were stored, {number} are compared")
    return summarize(found, None)


def _distances(stored: Predictions, row: int, logits: torch.Tensor, ids: torch.Tensor) -> Distances:
    parts: list[list[torch.Tensor]] = []
    for tokens in _chunks(len(ids)):
        ours = logits[tokens].float().log_softmax(-1)
        top = stored.top[row, tokens].long().to(ours.device)
        theirs = stored.log_probs[row, tokens].to(ours.device)
        rest = stored.log_rest[row, tokens].to(ours.device)
        our_rest = _log_rest(ours, top, rest.shape[-1])
        of_rest = torch.where(rest.isfinite(), rest.exp() * (rest - our_rest), 0.0).sum(-1)
        target = ids[1:][tokens, None].to(ours.device)
        parts.append([
            -ours.gather(1, target)[:, 0],
            stored.nll[row, tokens].to(ours.device),
            (theirs.exp() * (theirs - ours.gather(1, top))).sum(-1) + of_rest,
            (ours.argmax(-1) == top[:, 0]).float(),
        ])  # fmt: skip
    return Distances(*(torch.cat(of).cpu() for of in zip(*parts, strict=True)))
