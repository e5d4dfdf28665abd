"""How weights are rounded, beyond plain GPTQ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class ScaleSearch(StrEnum):
    """Where scales come from."""

    GIVEN = "given"  # the caller's
    NARROW = "narrow"  # at most 20 % off the range, by sum |e|^2.4
    MODERATE = "moderate"  # at most 40 % off the range, by sum |e|^3.5
    CONDITIONAL = "conditional"  # wide, errors weighted by what no later column makes up for
    GROUP = "group"  # wide, by the group's own block of the Hessian


@dataclass(frozen=True)
class SolverOptions:
    """How weights are rounded; the defaults are plain GPTQ on the scales that are given.

    Attributes:
        scale_search: where scales come from.
        signed: let the search choose the sign of symmetric scales too.
        rounds: of refitting scales and descending along codes after GPTQ; scales are refitted
            once more at the end.
        dampening_frac: fraction of the mean diagonal that is added to the diagonal.
        prior_tokens: in units of input features, how many tokens of white noise a linear that has
            seen next to nothing is taken to have seen beside its own, where that is more than
            ``dampening_frac``; one that has seen ten for each feature needs none.
        block_size: see :func:`moeq_plugin.core.gptq.solve`.
    """

    scale_search: ScaleSearch = ScaleSearch.GIVEN
    signed: bool = False
    rounds: int = 0
    dampening_frac: float = 0.01
    prior_tokens: float = 0.0
    block_size: int = 128

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ValueError(f"rounds must be at least 0, got {self.rounds}")
        if not 0 <= self.dampening_frac < math.inf:
            raise ValueError(f"dampening_frac must be finite, >= 0, got {self.dampening_frac}")
        if not 0 <= self.prior_tokens < math.inf:
            raise ValueError(f"prior_tokens must be finite, >= 0, got {self.prior_tokens}")
        if self.signed and self.scale_search is ScaleSearch.GIVEN:
            raise ValueError("signed needs a scale search: given scales are taken as they are")

    @property
    def is_plain(self) -> bool:
        """Tell whether this is GPTQ and nothing else."""
        return self.scale_search is ScaleSearch.GIVEN and self.rounds == 0
