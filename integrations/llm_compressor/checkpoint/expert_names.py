"""How checkpoints call an expert's projections, read off the rules that transformers loads by.

transformers fuses, say, ``experts.*.w1.weight`` and ``experts.*.w3.weight`` into ``gate_up_proj``
while loading. The host splits the fused tensor again and calls the parts ``gate_proj`` and
``up_proj``. The names in between are in the rule.
"""

from __future__ import annotations

import re

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform

# how a linearized expert calls what transformers fuses into one tensor
_FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
_PER_EXPERT = re.compile(r"experts\.\*\.(\w+)\.weight\$?$")


def names_in_checkpoint(rules: list[WeightTransform]) -> dict[str, str]:
    """Return for each projection of an expert what a checkpoint calls it; empty without a rule."""
    names: dict[str, str] = {}
    for rule in rules:
        if not isinstance(rule, WeightConverter):
            continue
        targets = [str(pattern) for pattern in rule.target_patterns]
        sources = [_PER_EXPERT.search(str(source)) for source in rule.source_patterns]
        fused = _FUSED.get(targets[0].rsplit(".", 1)[-1]) if len(targets) == 1 else None
        if fused and len(fused) == len(sources) and all(sources):
            names.update(zip(fused, (m.group(1) for m in sources if m), strict=True))
    return names


def loading_rules(model: PreTrainedModel) -> list[WeightTransform]:
    """Return the rules that the model was loaded by, or would be."""
    # transformers keeps on the model what it loaded by; one made from a config has nothing yet
    loaded = getattr(model, "_weight_conversions", None)
    return list(get_model_conversion_mapping(model) if loaded is None else loaded)


def linearized_rules(rules: list[WeightTransform]) -> list[WeightTransform]:
    """Replace the rules that fuse experts by renamings of each expert's projections."""
    renamings = [
        WeightRenaming(rf"\.experts\.(\d+)\.{theirs}\.", rf".experts.\1.{ours}.")
        for ours, theirs in names_in_checkpoint(rules).items()
        if ours != theirs
    ]
    # a rule that fuses would look for tensors that a linearized model does not have
    return [rule for rule in rules if not names_in_checkpoint([rule])] + renamings


def is_loaded_linearized(rules: list[WeightTransform]) -> bool:
    """Tell whether the host loaded per-expert tensors as they are, which it then saves likewise."""
    return any(re.search(r"experts.*\\d", str(rule.source_patterns)) for rule in rules)
