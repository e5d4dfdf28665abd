"""What a checkpoint's recipe says was done to the weights before they were quantized."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Modifiers of llm-compressor and ours after which a model computes the same with other weights:
_RESCALED = {
    "AWQModifier", "MoEQuantAWQModifier", "SmoothQuantModifier", "LogarithmicEqualizationModifier",
}  # fmt: skip
_ROTATED = {"ResidualRotationModifier", "SpinQuantModifier", "QuIPModifier"}
# and after which it computes something else on purpose:
_PRUNED_EXPERTS = {"REAPPruningModifier"}
_PRUNED_WEIGHTS = {
    "SparseGPTModifier", "WandaPruningModifier", "MagnitudePruningModifier",
    "ConstantPruningModifier",
}  # fmt: skip
# a field of ours: what is rounded is not the source's weight but what makes up for earlier rounding
_CORRECTED = re.compile(r"^[ \t]*(corrected_target):[ \t]*true[ \t]*$", re.M)
_MAX_BYTES = 1 << 22


@dataclass(frozen=True)
class Rewrites:
    """What modifiers did to weights, by their names.

    Attributes:
        rescaled: scaled columns, and the rows that make up for it.
        rotated: turned what passes between layers.
        pruned_experts: removed experts.
        pruned_weights: set weights to zero.
        corrected: fields that made quantized weights make up for what was rounded before them.
    """

    rescaled: tuple[str, ...] = ()
    rotated: tuple[str, ...] = ()
    pruned_experts: tuple[str, ...] = ()
    pruned_weights: tuple[str, ...] = ()
    corrected: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Return the modifiers, or fields, after which weights are no longer the source's."""
        return sorted({*self.rescaled, *self.rotated, *self.pruned_weights, *self.corrected})


def read_rewrites(directory: Path) -> Rewrites:
    """Return what ``recipe.yaml`` names, if the host wrote one; values matter of one field only."""
    recipe = directory / "recipe.yaml"
    if not recipe.is_file() or recipe.stat().st_size > _MAX_BYTES:
        return Rewrites()
    content = recipe.read_text(errors="replace")
    named = set(re.findall(r"^[ \t]*(\w{1,80}):", content, re.M))
    kinds = (
        _RESCALED, _ROTATED, _PRUNED_EXPERTS, _PRUNED_WEIGHTS, set(_CORRECTED.findall(content)),
    )  # fmt: skip
    return Rewrites(*(tuple(sorted(named & kind)) for kind in kinds))
