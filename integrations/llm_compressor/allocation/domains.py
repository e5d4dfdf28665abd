"""Which kinds of text a calibration set holds, and how ranks count their sequences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from moeq_plugin.integrations.llm_compressor.calibration import ranks
from moeq_plugin.integrations.llm_compressor.calibration.data_split import domains_of


@dataclass(frozen=True)
class Domains:
    """The kinds of text that losses are measured on, each by itself.

    Attributes:
        numbers: those values of the column ``domain`` that occur, in ascending order.
        names: theirs, in the same order.
        before: sequences of each domain that other ranks have, before this one's.
    """

    numbers: tuple[int, ...]
    names: tuple[str, ...]
    before: Mapping[int, int]

    @classmethod
    def of(
        cls, batches: Iterable[Mapping[str, torch.Tensor]], names: Sequence[str] | None
    ) -> Domains:
        """Count the domains of a calibration set, on all ranks together.

        Args:
            batches: this rank's.
            names: of the values 0, 1, ... of the column ``domain``; ``None`` for the numbers.

        Raises:
            ValueError: if a domain has too few sequences to halve, or no name.
        """
        ours = Counter(domain for batch in batches for domain in domains_of(dict(batch)))
        # counted over ranks, so that every rank refuses, or none does and leaves others waiting
        before, counts = ranks.over_ranks(ours)
        few = {domain: count for domain, count in counts.items() if count < 2}
        if few or not counts:
            raise ValueError(
                "one half of the calibration sequences rounds and the other judges: at least two "
                f"sequences are needed (of each domain), got {few}"
            )
        names = names or tuple(str(number) for number in range(max(counts) + 1))
        if min(counts) < 0 or max(counts) >= len(names):
            raise ValueError(
                f"the column `domain` must hold 0 to {len(names) - 1} for the domains "
                f"{list(names)}, got {sorted(counts)}"
            )
        numbers = tuple(sorted(counts))
        return cls(numbers, tuple(names[number] for number in numbers), before)
