"""What a file calls the tensors of a model, and the other way round.

transformers renames while it loads and undoes that while it saves. Its rules are for tensors: many
end in ``.weight`` and leave the bare name of a module half renamed.
"""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.core_model_loading import PrefixChange, WeightRenaming, WeightTransform

from moeq_plugin.integrations.llm_compressor.checkpoint.expert_names import (
    linearized_rules,
    loading_rules,
)


def renamed(name: str, rules: Iterable[WeightTransform]) -> str:
    """Return a name after all renamings among the rules, one after the other."""
    for rule in rules:
        if isinstance(rule, WeightRenaming):
            name, _ = rule.rename_source_key(name)
    return name


def module_renamed(name: str, rules: Iterable[WeightTransform]) -> str:
    """Return the name of a module with a weight after all renamings; an expression stays."""
    if name.startswith("re:"):
        return name
    return renamed(f"{name}.weight", rules).removesuffix(".weight")


def saving_rules(model: PreTrainedModel) -> list[WeightTransform]:
    """Return the rules that saving the linearized model undoes.

    A model that was never loaded does not know of prefixes that its files lack.
    """
    is_loaded = getattr(model, "_weight_conversions", None) is not None
    rules = linearized_rules(loading_rules(model))
    return [rule for rule in rules if is_loaded or not isinstance(rule, PrefixChange)]


def saving_renamings(model: PreTrainedModel) -> list[WeightTransform]:
    """Return what turns names of the linearized model into names of files."""
    undone = [rule.reverse_transform() for rule in reversed(saving_rules(model))]
    return [rule for rule in undone if isinstance(rule, WeightRenaming)]
