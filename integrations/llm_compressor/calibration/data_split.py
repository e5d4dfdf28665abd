"""Halves and domains of a calibration set, told apart while its batches run.

Rounding to second moments and judging the result with the same ones flatters it, most of all
where tokens are few. So one half of the sequences rounds and the other half judges. An integer
column ``domain`` of the data set, where there is one, tells kinds of text apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch


class Part:
    """Stands in for a :class:`PaddingWatch` that calls all tokens of other parts padding.

    Args:
        watch: knows the batches.
        half: 0 or 1; every other sequence of a domain.
        domain: value of the column ``domain``, ``None`` for all.
        before: sequences of each domain that other ranks have, before this one's.
    """

    def __init__(
        self,
        watch: PaddingWatch,
        half: int,
        domain: int | None = None,
        before: Mapping[int, int] | None = None,
    ) -> None:
        self._watch, self._half, self._domain = watch, half, domain
        self._before = before or {}

    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pass on the arguments of the whole model."""
        self._watch.read(model, args, kwargs)

    def keep(self, num_rows: int) -> torch.Tensor | None:
        """Return ``[num_rows]`` bool, true for this part's tokens; ``None`` for foreign rows."""
        # by index: in the layer-by-layer pass a batch comes by once for each layer
        kept = self._kept[self._watch.batch_index]
        return kept if len(kept) == num_rows else None

    @property
    def num_tokens(self) -> int:
        """Return how many tokens belong to this part."""
        return sum(int(kept.sum()) for kept in self._kept)

    @cached_property
    def _kept(self) -> list[torch.Tensor]:
        # read once, on first use: the batches are not known before the host has cached them
        seen = Counter(self._before)
        kept = []
        for batch in self._watch.batches:
            ids = batch["input_ids"]
            is_ours = []
            for domain in domains_of(batch):
                # counted within the domain and over all ranks, so that both halves have all kinds
                in_half = seen[domain] % 2 == self._half
                is_ours.append(in_half and self._domain in {None, domain})
                seen[domain] += 1
            rows = torch.tensor(is_ours, device=ids.device)[:, None].expand(ids.shape)
            mask = batch.get("attention_mask")
            kept.append((rows if mask is None else rows & mask.bool()).flatten())
        return kept


def domains_of(batch: dict[str, torch.Tensor]) -> list[int]:
    """Return the domain of each sequence of a batch, 0 without a column ``domain``."""
    if "domain" in batch:
        return [int(value) for value in batch["domain"].flatten()]
    return [0] * len(batch["input_ids"])
