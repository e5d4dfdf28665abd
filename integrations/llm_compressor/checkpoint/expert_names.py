"""The rules that transformers loads a model by, and what becomes of them when it is linearized.

The names of experts in between are in the rules: see :mod:`moeq_plugin.models.expert_rules`.
"""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, WeightTransform

from moeq_plugin.models.expert_rules import names_in_checkpoint


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
