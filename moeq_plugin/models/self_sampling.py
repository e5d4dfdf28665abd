"""Let a Mixture-of-Experts model write its own calibration set (EBSS, arXiv:2505.03804).

Drives the search of ``core.beam_search`` with a causal language model: a cached forward per token
for all sequences of a batch at once, the routers' choices read where the experts receive them, so
that load and likelihood come from the same forward. Sequences do not know their batch: start and
prefix of sequence ``i`` depend on the seed and ``i`` alone, and ranks of ``torch.distributed``
share the sequences and end up with the same set.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed, nn

from moeq_plugin.core.beam_search import BeamSearch
from moeq_plugin.core.sampling import EBSSConfig, SampledSequence
from moeq_plugin.models.kv_cache import Branches
from moeq_plugin.models.moe import MoELayer, UnsupportedModelError, find_moe_layers
from moeq_plugin.models.routing import RoutingRecorder, weight_sums

_ROUND = 16  # sequences that are balanced against the same finished ones; part of the result


class SelfSampler:
    """Samples a set, keeps what is finished, and goes on where it was interrupted.

    Args:
        model: a causal language model of transformers.
        config: what to sample.
        special_ids: token ids that neither start a sequence nor appear in one.
        end_id: the end-of-sequence token, for ``config.min_length``.
        prompts: token ids to start from, taken in turn, instead of one random token.
        max_cached_tokens: how many tokens, over all branches, the cache may hold at a time. Has no
            influence on the result.
        on_finished: called with each sequence as soon as it is known to this process.
        on_step: called with the number of sequences that advanced by one token.

    Raises:
        UnsupportedModelError: if the model has no MoE layer.
        ValueError: if the model has too few positions or too small a vocabulary.
    """

    def __init__(
        self,
        model: nn.Module,
        config: EBSSConfig,
        *,
        special_ids: Sequence[int] = (),
        end_id: int | None = None,
        prompts: Sequence[Sequence[int]] | None = None,
        max_cached_tokens: int = 2**16,
        on_finished: Callable[[SampledSequence], None] = lambda sequence: None,
        on_step: Callable[[int], None] = lambda sequences: None,
    ) -> None:
        self._model, self._config, self._prompts = model, config, prompts
        self._layers = find_moe_layers(model)
        may_end = end_id is not None and config.min_length is not None
        self._end = end_id if may_end else None
        self._special = sorted(set(special_ids) - ({end_id} if may_end else set()))
        self._on_finished, self._on_step = on_finished, on_step
        self._vocabulary = _check(model, config, self._layers, self._special, prompts)
        self._batch = max(1, max_cached_tokens // (config.seq_len * config.beam_width))
        self.finished: dict[int, SampledSequence] = {}
        self.starved: dict[str, list[int]] = {}

    def run(self) -> list[SampledSequence]:
        """Sample what is missing in :attr:`finished` and return the whole set in order.

        An exception, such as a keyboard interrupt, leaves finished sequences in :attr:`finished`;
        another call continues. Experts that ``min_expert_tokens`` could not be reached for are
        in :attr:`starved` afterwards, by layer name.
        """
        _share(self.finished)
        wanted = self._config.num_sequences
        was_training = self._model.training
        self._model.eval()
        try:
            size = _ROUND if self._config.global_balance else wanted
            for first in range(0, wanted, size):
                indices = range(first, min(first + size, wanted))
                self._run_round(indices, balanced=self._config.global_balance)
            if self._config.min_expert_tokens is not None:
                self._cover(self._config.min_expert_tokens)
        finally:
            self._model.train(was_training)
        return [self.finished[index] for index in sorted(self.finished)]

    def _cover(self, min_expert_tokens: float) -> None:
        """Add rounds until every expert has enough, one brings nothing, or the set has doubled."""
        wanted = self._config.num_sequences
        sums = self._weight_sums(range(wanted))
        for first in range(wanted, 2 * wanted, _ROUND):
            tokens = _effective(sums)
            lacking = tokens < min_expert_tokens
            if not lacking.any():
                break
            indices = range(first, min(first + _ROUND, 2 * wanted))
            self._run_round(indices, balanced=True)
            sums += self._weight_sums(indices)
            if not (_effective(sums) > tokens)[lacking].any():
                break
        self.starved = {
            layer.name: row.nonzero().flatten().tolist()
            for layer, row in zip(self._layers, _effective(sums) < min_expert_tokens, strict=True)
            if row.any()
        }

    def _weight_sums(self, indices: range) -> torch.Tensor:
        return weight_sums(
            self._model, self._layers, [self.finished[index].input_ids for index in indices]
        )

    def _run_round(self, indices: range, *, balanced: bool) -> None:
        """Sample those of ``indices`` that are missing; ``balanced`` against all before them.

        Batches are formed as if none were finished: another batch would round otherwise, and a
        continued set could differ from an uninterrupted one.
        """
        base = [self.finished[i] for i in range(indices.start)] if balanced else []
        rank, world = _rank_and_world()
        starts = {index: self._start(index) for index in indices[rank::world]}
        by_length = sorted(starts, key=lambda index: (len(starts[index]), index))
        for _, group in itertools.groupby(by_length, key=lambda index: len(starts[index])):
            same_length = list(group)
            for first in range(0, len(same_length), self._batch):
                batch = same_length[first : first + self._batch]
                if all(index in self.finished for index in batch):
                    continue
                for sequence in self._sample(batch, [starts[index] for index in batch], base):
                    if sequence.index not in self.finished:
                        self.finished[sequence.index] = sequence
                        self._on_finished(sequence)
        for sequence in _share(self.finished):
            self._on_finished(sequence)

    @torch.no_grad()
    def _sample(
        self, batch: list[int], starts: list[list[int]], base: Sequence[SampledSequence]
    ) -> list[SampledSequence]:
        device = next(self._model.parameters()).device
        tokens = torch.tensor(starts, device=device)
        search = BeamSearch(
            tokens,
            batch,
            self._config,
            blocked=self._special,
            end=self._end,
            base_load=torch.tensor([s.load for s in base], device=device).sum(0) if base else None,
            base_tokens=sum(len(sequence.input_ids) for sequence in base),
        )
        branches = Branches(self._model, self._config.seq_len)
        chances = [random.Random(f"{self._config.seed}/{index}") for index in batch]
        with RoutingRecorder(self._layers) as recorder:
            logits = branches.start(tokens)
            load = recorder.take_load(len(batch))[:, None]
            for step in itertools.count():
                self._on_step(len(batch))
                if search.is_done:
                    break
                if self._config.tau is None or step < self._config.prefix_tokens:
                    chance = torch.tensor([rng.random() for rng in chances], device=device)
                    extension = search.sample(logits, load, chance)
                else:
                    extension = search.advance(logits, load)
                logits = branches.extend(extension)
                shape = extension.tokens.shape
                load = recorder.take_load(shape.numel()).unflatten(0, shape)
        return search.finish(load)

    def _start(self, index: int) -> list[int]:
        """Return what a sequence starts from: ids are drawn without replacement, then anew."""
        if self._prompts is not None:
            return list(self._prompts[index % len(self._prompts)])
        usable = sorted(set(range(self._vocabulary)) - set(self._special))
        again, position = divmod(index, len(usable))
        random.Random(f"{self._config.seed}/start/{again}").shuffle(usable)
        return [usable[position]]


def _check(
    model: nn.Module,
    config: EBSSConfig,
    layers: Sequence[MoELayer],
    special: Sequence[int],
    prompts: Sequence[Sequence[int]] | None,
) -> int:
    """Return the size of the vocabulary.

    Raises:
        UnsupportedModelError: if the model has no MoE layer.
        ValueError: if the model or the prompts do not fit the configuration.
    """
    name = type(model).__name__
    if not layers:
        raise UnsupportedModelError(
            f"{name} has no Mixture-of-Experts layer whose load could be balanced; pass a "
            "calibration data set instead (oneshot(..., dataset=...))"
        )
    settings: Any = model.config
    settings = settings.get_text_config()
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is not None and config.seq_len > positions:
        raise ValueError(
            f"seq_len must not exceed the {positions} positions of {name}, got {config.seq_len}"
        )
    vocabulary = int(settings.vocab_size)
    if vocabulary - len(special) < config.beam_width:
        raise ValueError(
            f"beam_width must not exceed the {vocabulary - len(special)} tokens of {name} that "
            f"are not special, got {config.beam_width}"
        )
    longest = config.seq_len - (0 if config.tau is None else config.prefix_tokens)
    lengths = [1] if prompts is None else [len(prompt) for prompt in prompts]
    wrong = [number for number, length in enumerate(lengths) if not 1 <= length <= longest]
    if wrong or not lengths:
        raise ValueError(
            f"prompts must have 1 to {longest} tokens (seq_len - prefix_tokens) and there must be "
            f"at least one; got {len(lengths)}, of which {wrong[:10]} have another length"
        )
    return vocabulary


def _effective(sums: torch.Tensor) -> torch.Tensor:
    """Return ``[layers, experts]`` effective tokens of ``[2, layers, experts]`` weight sums."""
    return (sums[0].square() / sums[1]).nan_to_num(0.0)


def _rank_and_world() -> tuple[int, int]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _share(finished: dict[int, SampledSequence]) -> list[SampledSequence]:
    """Make all ranks know what any of them has finished; return what is new to this one."""
    _, world = _rank_and_world()
    if world == 1:
        return []
    everyone: list[dict[int, SampledSequence]] = [{} for _ in range(world)]
    distributed.all_gather_object(everyone, finished)
    merged = {index: sequence for ours in everyone for index, sequence in ours.items()}
    new = [merged[index] for index in sorted(merged.keys() - finished.keys())]
    finished.update({sequence.index: sequence for sequence in new})
    return new
