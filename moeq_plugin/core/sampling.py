"""EBSS, expert-balanced self-sampling: what is sampled, and the one definition of imbalance.

The model writes its own calibration set: likely text that loads all experts evenly
(arXiv:2505.03804, Section 4.2). The search is in ``beam_search``; what feeds a model is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class EBSSConfig:
    """What to sample. The other defaults are the paper's where it names any.

    Attributes:
        num_sequences: how many.
        seq_len: tokens per sequence, start token included.
        beam_width: branches per sequence.
        tau: nats per unit of imbalance are ``1 / tau``, the paper's is 1.2; ``math.inf`` searches
            for likely text only. ``None`` does not search: every token is sampled, which
            calibrates better (docs/ebss.md).
        prefix_tokens: tokens between the start and a search that are sampled from the model,
            unguided, so that sequences differ and begin coherently.
        seed: decides start tokens and prefixes; the search itself is deterministic.
        no_repeat_ngram: no sequence contains an n-gram of this size twice; ``None`` allows all.
        min_length: from this length on a branch may end with the end-of-sequence token; ``None``
            never, so that every sequence has exactly ``seq_len`` tokens.
        global_balance: judge a branch by what it adds to the imbalance of all finished sequences
            together, instead of by its own.
        min_expert_tokens: sample further sequences, up to as many again, until the combine
            weights of every expert amount to this many effective tokens; ``None`` does not.
    """

    num_sequences: int = 128
    seq_len: int = 512
    beam_width: int = 4
    tau: float | None = None
    prefix_tokens: int = 3
    seed: int = 0
    no_repeat_ngram: int | None = None
    min_length: int | None = None
    global_balance: bool = False
    min_expert_tokens: float | None = None

    def __post_init__(self) -> None:
        last = self.seq_len - 1
        ngram, shortest, tokens = self.no_repeat_ngram, self.min_length, self.min_expert_tokens
        problems = [
            f"{name} must be {expected}, got {getattr(self, name)}"
            for name, expected, holds in (
                ("num_sequences", "at least 1", self.num_sequences >= 1),
                ("seq_len", "at least 2: a start token and one to predict", self.seq_len >= 2),
                ("beam_width", "at least 1 (1 is greedy)", self.beam_width >= 1),
                (
                    "tau",
                    "None or positive (math.inf: no balancing)",
                    self.tau is None or self.tau > 0,
                ),
                ("prefix_tokens", f"0 to {last} (seq_len - 1)", 0 <= self.prefix_tokens <= last),
                (
                    "global_balance",
                    "False without tau: what is sampled is not balanced",
                    self.tau is not None or not self.global_balance,
                ),
                ("seed", "0 or more", self.seed >= 0),
                ("no_repeat_ngram", "None or at least 1", ngram is None or ngram >= 1),
                (
                    "min_length",
                    f"None or 2 to {self.seq_len} (seq_len)",
                    shortest is None or 2 <= shortest <= self.seq_len,
                ),
                ("min_expert_tokens", "None or positive", tokens is None or tokens > 0),
            )
            if not holds
        ]
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class SampledSequence:
    """One finished sequence.

    Attributes:
        index: its number in the set, which together with the seed decides its start.
        input_ids: token ids.
        nll: mean negative log-probability of the tokens after the start, in nats.
        imbalance: its own ``expert_imbalance``.
        load: ``[layers][experts]``, slots over all top-k that each expert received.
    """

    index: int
    input_ids: list[int]
    nll: float
    imbalance: float
    load: list[list[int]]


def expert_imbalance(load: torch.Tensor, num_tokens: torch.Tensor | int) -> torch.Tensor:
    """Return sigma, ``[...]`` float32: 0 if every expert of every layer has the same load.

    ``sigma = mean over layers of std over experts of load / num_tokens`` with the unbiased
    standard deviation (Eq. 3 and 4). The paper leaves the denominator open; with tokens, and all
    top-k slots counted, its reported values are possible.

    Args:
        load: ``[..., layers, experts]`` slots that each expert received.
        num_tokens: ``[...]`` or one number; no tokens give 0.

    Example:
        >>> expert_imbalance(torch.tensor([[2, 2], [4, 0]]), 4)  # layers of sigma 0 and 0.7071
        tensor(0.3536)
    """
    if load.shape[-1] < 2:
        return load.new_zeros(load.shape[:-2], dtype=torch.float32)
    tokens = torch.as_tensor(num_tokens, device=load.device).clamp(min=1)
    return load.float().std(-1).mean(-1) / tokens


def draw(probability: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Return the class that each uniform number falls on, ``[..., 1]`` int64.

    Args:
        probability: ``[..., classes]``, need not sum to exactly 1.
        chance: ``[...]``, in [0, 1).

    Example:
        >>> draw(torch.tensor([[0.5, 0.0, 0.5]] * 2), torch.tensor([0.4, 0.5]))
        tensor([[0],
                [2]])
    """
    cumulative = probability.cumsum(-1)
    # scaled by the total, which is not exactly 1, so that a class of probability 0 is not drawn
    threshold = chance[..., None].to(cumulative) * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True)
    return drawn.clamp(max=probability.shape[-1] - 1)  # where the product rounds up to the total


def completes_old_ngram(input_ids: torch.Tensor, size: int, vocabulary: int) -> torch.Tensor:
    """Return ``[..., vocabulary]`` bool: the tokens that would repeat an n-gram of ``input_ids``.

    Args:
        input_ids: ``[..., tokens]`` with at least ``size`` tokens.
        size: the n of the n-gram, the new token included; 1 names every token seen.
        vocabulary: number of tokens there are.

    Example:
        >>> completes_old_ngram(torch.tensor([3, 1, 2, 3]), 2, 4)  # 3 1 is old
        tensor([False,  True, False, False])
    """
    grams = input_ids.unfold(-1, size, 1)  # [..., positions, size]
    tail = input_ids[..., input_ids.shape[-1] - size + 1 :]
    is_tail = (grams[..., :-1] == tail[..., None, :]).all(-1)
    follows = torch.where(is_tail, grams[..., -1], vocabulary)
    shape = (*input_ids.shape[:-1], vocabulary + 1)
    repeats = torch.zeros(shape, dtype=torch.bool, device=input_ids.device)
    return repeats.scatter_(-1, follows, value=True)[..., :-1]


def stay_in_place(parents: torch.Tensor) -> torch.Tensor:
    """Return the order in which branch ``p`` comes ``p``-th wherever ``p`` is a parent at all.

    Args:
        parents: ``[sequences, branches]``, as many as there were.

    Example:
        >>> parents = torch.tensor([[2, 0, 2, 3]])
        >>> parents.gather(1, stay_in_place(parents))  # the second child of 2 replaces 1
        tensor([[0, 2, 2, 3]])
    """
    width = parents.shape[1]
    place = torch.arange(width, device=parents.device)
    is_later_child = ((parents[:, :, None] == parents[:, None]).tril(-1)).any(2)
    is_left = (parents[:, None] != place[:, None]).all(2)  # nobody extends the branch there
    child = torch.where(is_later_child, width + place, parents).argsort(dim=1)
    return torch.empty_like(parents).scatter_(
        1, is_left.to(torch.uint8).argsort(stable=True, dim=1), child
    )
