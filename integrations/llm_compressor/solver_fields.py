"""What a recipe says of how weights are rounded, and presets of it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from pydantic import Field, model_validator

from moeq_plugin.core.solver_options import ScaleSearch, SolverOptions
from moeq_plugin.integrations.llm_compressor.frozen_fields import FrozenFields


class Preset(StrEnum):
    """A set of fields under one name."""

    FAST = "fast"  # GPTQ on the observer's scales
    BALANCED = "balanced"  # what was measured to help on every model, from second moments alone
    BEST = "best"  # with a backward pass through the whole model beside


_BALANCED: Mapping[str, Any] = {
    "scale_search": ScaleSearch.MODERATE,
    "signed_scales": True,
    "refine_rounds": 2,
    "prior_tokens": 0.8,
}
PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    Preset.FAST: {},
    Preset.BALANCED: _BALANCED,
    Preset.BEST: {**_BALANCED, "row_feedback": True},
}


class SolverFields(FrozenFields):
    """How weights are rounded.

    Args:
        preset: fills in fields that are not given: ``balanced`` means ``scale_search="moderate"``,
            ``signed_scales=True``, ``refine_rounds=2`` and ``prior_tokens=0.8``; ``best`` the same
            with ``row_feedback=True``; ``fast`` means the defaults of the fields.
        scale_search: ``given`` takes the scales of the weight observer; ``narrow`` searches them
            within 20 % of the range, ``moderate`` within 40 %, ``conditional`` and ``group`` in a
            wide range by the second moments. An observer that a scheme or ``weight_observer`` asks
            for, other than the default one, comes before any search.
        signed_scales: let the search make scales negative on symmetric grids, where that puts the
            code without a counterpart on the side that needs it. Which readers were seen to take
            such scales is in ``docs/solver.md``.
        refine_rounds: after GPTQ, how often to refit scales to codes and improve codes one by one.
        prior_tokens: take linears that have seen few tokens to have seen white noise beside them,
            where that is more than ``dampening_frac``: with ``n`` tokens the share
            ``prior_tokens * (features / n - 1 / 10)`` of the mean diagonal is added, and nothing to
            one that has seen ten for each input feature. That counts for experts that the router
            seldom picks.
        row_feedback: let the rows of a weight make up for each other, as far as their outputs
            change the same predictions. Takes one backward pass through the whole model, over at
            most 16384 tokens of the calibration data.
        corrected_target: round weights that make up for what was rounded before them: q, k and v of
            a layer first, then the attention's output, then gate and up, then down, each against
            what the 16-bit model computes for the same tokens. Sensitivities are measured without.
    """

    preset: Preset = Preset.BALANCED
    scale_search: ScaleSearch = ScaleSearch.GIVEN
    signed_scales: bool = False
    refine_rounds: int = Field(default=0, ge=0)
    prior_tokens: float = Field(default=0.0, ge=0)
    row_feedback: bool = False
    corrected_target: bool = False
    # of the host's GPTQModifier, where a subclass is one
    block_size: int = 128
    dampening_frac: float | None = 0.01

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        preset = given.get("preset", cls.model_fields["preset"].default)
        fields = {**PRESETS.get(preset, {}), **given}
        if fields.get("scale_search") == ScaleSearch.GIVEN and "signed_scales" not in given:
            fields["signed_scales"] = False  # signs are found by a search
        return fields

    @model_validator(mode="after")
    def _check_solver(self) -> SolverFields:
        self.solver_options()
        return self

    def solver_options(self) -> SolverOptions:
        """Return how weights are rounded.

        Raises:
            ValueError: if the fields contradict each other.
        """
        return SolverOptions(
            scale_search=self.scale_search,
            signed=self.signed_scales,
            rounds=self.refine_rounds,
            dampening_frac=self.dampening_frac or 0.0,
            prior_tokens=self.prior_tokens,
            block_size=self.block_size,
        )
