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
_MAX_BYTES = 1 << 22


@dataclass(frozen=True)
class Rewrites:
    """What modifiers did to weights, by their names.

    Attributes:
        rescaled: scaled columns, and the rows that make up for it.
        rotated: turned what passes between layers.
        pruned_experts: removed experts.
        pruned_weights: set weights to zero.
    """

    rescaled: tuple[str, ...] = ()
    rotated: tuple[str, ...] = ()
    pruned_experts: tuple[str, ...] = ()
    pruned_weights: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Return the modifiers after which weights are no longer those of the source."""
        return sorted({*self.rescaled, *self.rotated, *self.pruned_weights})


def read_rewrites(directory: Path) -> Rewrites:
    """Return what ``recipe.yaml`` names, if the host wrote one; its values are not looked at."""
    recipe = directory / "recipe.yaml"
    if not recipe.is_file() or recipe.stat().st_size > _MAX_BYTES:
        return Rewrites()
    named = set(re.findall(r"^[ \t]*(\w{1,80}):", recipe.read_text(errors="replace"), re.M))
    kinds = (_RESCALED, _ROTATED, _PRUNED_EXPERTS, _PRUNED_WEIGHTS)
    return Rewrites(*(tuple(sorted(named & kind)) for kind in kinds))
