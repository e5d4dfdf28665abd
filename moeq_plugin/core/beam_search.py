"""The search of EBSS: token sequences that are likely and load all experts evenly.

A beam search (arXiv:2505.03804, Section 4.2). A branch ``S`` of ``l`` tokens
with cumulative log-probability ``R`` and expert load ``c`` is extended by token ``v`` at the cost

    ``-(R + log P(v | S)) / (l + 1)  +  sigma(c, l) / tau``        (Eq. 13, lower is better)

``sigma`` is the branch's own, without ``v``, whose routing is unknown until it is fed. It is one
constant per branch, so the cheapest ``w`` tokens of each branch are enough to find the cheapest
``w`` of all. The last choice among ``w`` complete branches uses everything (Eq. 10).

Where Algorithm 1 of the paper contradicts its equations (sigma of the child, a maximum instead of
a minimum, ``E / (E - 1)`` under the root) the equations are followed. The model is not known here:
the caller feeds tokens, hands back logits and loads, and reorders its cache as told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moeq_plugin.core.sampling import (
    EBSSConfig,
    SampledSequence,
    completes_old_ngram,
    draw,
    expert_imbalance,
    stay_in_place,
)


@dataclass(frozen=True)
class Extension:
    """How the branches of the next step follow from those of the last.

    Attributes:
        tokens: ``[sequences, branches]`` int64, to be fed next.
        parents: ``[sequences, branches]``, the former branch that each branch extends. A branch
            that is extended at all keeps its place, so that few rows of a cache have to move.
        shared_tokens: ``[sequences, branches]``, how many leading tokens the parent has in common
            with the branch whose place is taken: from there on a cache has to be copied. Equal to
            ``length`` for a branch that stays.
        length: tokens of the parents.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    shared_tokens: torch.Tensor
    length: int


class BeamSearch:
    """The branches of several sequences that advance together, one token at a time.

    The caller feeds :attr:`input_ids` or the last chosen tokens to a model, hands logits and load
    of that step to :meth:`sample` or :meth:`advance`, and reorders its cache by the parents that
    it gets back. When :attr:`is_done`, it hands the last load to :meth:`finish`.

    Args:
        start: ``[sequences, prompt]`` int64, one length for all.
        index: the number of each sequence in the set.
        config: what to search for.
        blocked: ids that are never chosen, such as special tokens.
        end: the end-of-sequence token; ``None`` if sequences never end early.
        base_load: ``[layers, experts]`` of finished sequences, for ``global_balance``.
        base_tokens: how many tokens they have.
    """

    def __init__(
        self,
        start: torch.Tensor,
        index: Sequence[int],
        config: EBSSConfig,
        *,
        blocked: Sequence[int] = (),
        end: int | None = None,
        base_load: torch.Tensor | None = None,
        base_tokens: int = 0,
    ) -> None:
        sequences, self._prompt_tokens = start.shape
        self._config, self._index, self._end = config, list(index), end
        self._base = base_load, base_tokens
        self._blocked = torch.tensor(blocked, dtype=torch.int64, device=start.device)
        self._load: torch.Tensor | None = None  # [sequences, branches, layers, experts]
        self._unfed = start.new_ones(sequences, 1, dtype=torch.bool)  # load of last token is due
        self.is_finished = ~self._unfed  # [sequences, branches], ended by the end token
        self.log_prob = torch.zeros(sequences, 1, dtype=torch.float64, device=start.device)
        self.length = torch.full_like(self._unfed, self._prompt_tokens, dtype=torch.int64)
        self.input_ids = start[:, None]

    @property
    def is_done(self) -> bool:
        """Return whether no branch can grow any more."""
        return self.input_ids.shape[2] >= self._config.seq_len or bool(self.is_finished.all())

    def sample(self, logits: torch.Tensor, load: torch.Tensor, chance: torch.Tensor) -> Extension:
        """Append to each sequence's only branch a token drawn from the model, unguided.

        Args:
            logits: ``[sequences, 1, vocabulary]`` after the tokens fed last.
            load: ``[sequences, 1, layers, experts]`` of those tokens.
            chance: ``[sequences]`` uniform in [0, 1), decides the token.

        Returns:
            The only branch of each sequence, in its place.
        """
        self._record(load)
        allowed, normalizer = self._allowed(logits, may_end=False)
        tokens = draw(allowed.double().softmax(-1), chance[:, None])
        gain = logits.gather(2, tokens).double() - normalizer
        parents = torch.zeros_like(tokens[..., 0])
        return self._extend(parents, tokens[..., 0], self.log_prob + gain[..., 0])

    def advance(self, logits: torch.Tensor, load: torch.Tensor) -> Extension:
        """Extend all branches by one token and keep the cheapest ``beam_width`` per sequence.

        Args:
            logits: ``[sequences, branches, vocabulary]`` after the tokens fed last.
            load: ``[sequences, branches, layers, experts]`` of those tokens.

        Returns:
            The kept branches, fewer than ``beam_width`` only while there are not that many.
        """
        self._record(load)
        allowed, normalizer = self._allowed(logits, may_end=True)
        gain, tokens = allowed.topk(min(self._config.beam_width, allowed.shape[2]))
        total = self.log_prob[..., None] + (gain.double() - normalizer)
        if self._end is not None:  # an ended branch competes as it is, in one copy
            total = torch.where(self.is_finished[..., None], -math.inf, total)
            total[..., 0] = torch.where(self.is_finished, self.log_prob, total[..., 0])
        length = self.length + ~self.is_finished
        score = -total / length[..., None] + self._penalty()[..., None]
        candidates = score.flatten(1)
        branches = min(self._config.beam_width, candidates.shape[1])
        chosen = candidates.topk(branches, largest=False).indices
        parents = chosen // tokens.shape[2]
        if branches == self.input_ids.shape[1]:
            order = stay_in_place(parents)
            chosen, parents = chosen.gather(1, order), parents.gather(1, order)
        tokens = tokens.flatten(1).gather(1, chosen)
        return self._extend(parents, tokens, total.flatten(1).gather(1, chosen))

    def finish(self, load: torch.Tensor) -> list[SampledSequence]:
        """Return the best branch of each sequence, judged by its whole likelihood and load.

        Args:
            load: ``[sequences, branches, layers, experts]`` of the tokens fed last.

        Raises:
            ValueError: if every token of a sequence was blocked.
        """
        self._record(load)
        score = -self.log_prob / self.length + self._penalty()
        best = score.argmin(1)
        imbalance = expert_imbalance(self._recorded, self.length)
        dead = [self._index[row] for row in score.isinf().all(1).nonzero().flatten().tolist()]
        if dead:
            raise ValueError(
                f"no token was left to continue sequences {dead}: no_repeat_ngram "
                f"{self._config.no_repeat_ngram} blocks too much for this vocabulary; raise it"
            )
        return [
            SampledSequence(
                index=index,
                input_ids=self.input_ids[row, branch, :length].tolist(),
                nll=-self.log_prob[row, branch].item() / max(1, length - self._prompt_tokens),
                imbalance=imbalance[row, branch].item(),
                load=self._recorded[row, branch].tolist(),
            )
            for row, index in enumerate(self._index)
            for branch in [int(best[row])]
            for length in [int(self.length[row, branch])]
        ]

    @property
    def _recorded(self) -> torch.Tensor:
        assert self._load is not None  # every public method records first
        return self._load

    def _record(self, load: torch.Tensor) -> None:
        """Add the load of the tokens fed last, except after the end of a branch."""
        fed = load * self._unfed[..., None, None]
        self._load = fed if self._load is None else self._load + fed

    def _penalty(self) -> torch.Tensor:
        """Return ``[sequences, branches]``: what imbalance costs each branch.

        With a base, Eq. 10 for all sequences together: the growth of ``tokens * sigma``, per
        token of this branch. Without one this is the branch's own sigma.
        """
        base_load, base_tokens = self._base
        imbalance = expert_imbalance(self._recorded, self.length)
        if base_load is not None:
            tokens = base_tokens + self.length
            grown = tokens * expert_imbalance(self._recorded + base_load, tokens)
            imbalance = (
                grown - base_tokens * expert_imbalance(base_load, base_tokens)
            ) / self.length
        return imbalance / (self._config.tau or math.inf)  # no tau: nothing is searched for

    def _allowed(self, logits: torch.Tensor, *, may_end: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 logits with blocked tokens at ``-inf``, and the log of their sum before.

        Raises:
            ValueError: if logits are not finite.
        """
        logits = logits.float()
        normalizer = logits.logsumexp(-1, keepdim=True)
        broken = (~normalizer.isfinite()).flatten(1).any(1)
        if broken.any():
            names = [self._index[row] for row in broken.nonzero().flatten().tolist()]
            raise ValueError(
                f"the model's logits are not finite after {self.input_ids.shape[2]} tokens of "
                f"sequences {names}; sampling cannot go on. Check the weights, or use another "
                "dtype: float16 overflows in many models that were trained in bfloat16"
            )
        allowed = logits.index_fill(2, self._blocked, -math.inf)
        length = self.input_ids.shape[2]
        if self._end is not None and (length + 1 < (self._config.min_length or 0) or not may_end):
            allowed[..., self._end] = -math.inf
        size = self._config.no_repeat_ngram
        if size is not None and length >= size:
            allowed.masked_fill_(
                completes_old_ngram(self.input_ids, size, allowed.shape[2]), -math.inf
            )
        return allowed, normalizer.double()

    def _extend(
        self, parents: torch.Tensor, tokens: torch.Tensor, log_prob: torch.Tensor
    ) -> Extension:
        """Replace each branch by its parent plus one token."""
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        ids = self.input_ids[rows, parents]  # [sequences, branches, length]
        length = ids.shape[2]
        shared = torch.full_like(parents, length)
        if ids.shape == self.input_ids.shape:
            shared = (ids == self.input_ids).cumprod(-1).sum(-1)
        self.input_ids = torch.cat([ids, tokens[..., None]], dim=2)
        self._load = self._recorded[rows, parents]
        self._unfed = ~self.is_finished[rows, parents]
        self.length = self.length[rows, parents] + self._unfed
        self.is_finished = ~self._unfed
        if self._end is not None:
            self.is_finished = self.is_finished | (tokens == self._end)
        self.log_prob = log_prob
        return Extension(tokens, parents, shared, length)
