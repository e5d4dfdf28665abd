"""A uniform sample of the tokens that enter a MoE layer, for experts that saw few of their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from moeq_plugin.core.hessian import SecondMoments
from moeq_plugin.models.moe import RoutingTrace

_MIN_SAMPLE_TOKENS = 1024
_Tokens = tuple[torch.Tensor, Any, Any]  # draws; rows and routing, or twice None


@dataclass
class TokenSample:
    """A uniform random sample of the tokens that enter a MoE layer, for experts that saw few.

    Every token draws a number and the largest numbers stay. Twice as many tokens as features give
    second moments of full rank and take about as much memory as one Hessian.
    """

    generator: torch.Generator
    rows: torch.Tensor | None = None
    routing: RoutingTrace | None = None
    draws: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, rows: torch.Tensor, routing: RoutingTrace) -> None:
        """Offer ``[tokens, hidden]`` rows and where they are routed to the sample."""
        # on the CPU, so that the sample does not depend on the device
        draws = torch.rand(len(rows), generator=self.generator)
        self._take([(self.draws, self.rows, self.routing), (draws, rows, routing)])

    def merge(self, parts: Iterable[_Tokens]) -> None:
        """Become the sample of all tokens that the samples in ``parts`` were drawn from.

        Args:
            parts: draws, rows and routing of samples that drew differently; this one's own too.
        """
        self.draws, self.rows, self.routing = torch.empty(0), None, None
        self._take(parts)

    def _take(self, parts: Iterable[_Tokens]) -> None:
        some = [part for part in parts if part[1] is not None]
        draws = torch.cat([part[0] for part in some])
        rows = torch.cat([part[1].to(some[0][1].device) for part in some])
        routing = some[0][2]
        for part in some[1:]:
            routing = routing.extended(part[2].to(rows.device))
        capacity = max(_MIN_SAMPLE_TOKENS, 2 * rows.shape[1])
        if len(draws) > capacity:
            draws, kept = draws.topk(capacity)
            kept = kept.to(rows.device)
            rows, routing = rows[kept], routing.of_tokens(kept)
        self.draws, self.rows, self.routing = draws, rows, routing

    @cached_property
    def moments(self) -> SecondMoments:
        """Second moments of the sample; read them once it is complete."""
        assert self.rows is not None  # asked for only where a batch went by
        moments = SecondMoments.zeros(self.rows.shape[-1], self.rows.device)
        moments.add(self.rows)
        return moments
