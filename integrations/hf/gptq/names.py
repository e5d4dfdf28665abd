"""Two names for one tensor: a checkpoint's, and that of the module transformers 5 loads it into.

They differ where transformers renames while loading: Mixtral's ``block_sparse_moe.experts.0.w1``
becomes ``mlp.experts.0.gate_proj``. vLLM, AutoGPTQ and transformers read the former, GPTQModel 7.7
the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from functools import reduce

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from moeq_plugin.integrations.llm_compressor.checkpoint.expert_names import linearized_rules


class Names(StrEnum):
    """Whose names tensors have."""

    CHECKPOINT = "checkpoint"
    MODULES = "modules"


def renamer(model_type: str, names: Names) -> Callable[[str], str]:
    """Return a function from a tensor's name, of either kind, to its name of one kind.

    Args:
        model_type: architecture, as ``config.json`` calls it.
        names: the kind.
    """
    rules = linearized_rules(list(get_checkpoint_conversion_mapping(model_type) or ()))
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    if names is Names.CHECKPOINT:
        renamings = [_reversed(renaming) for renaming in reversed(renamings)]

    def rename(name: str) -> str:
        return reduce(lambda old, rule: rule.rename_source_key(old)[0], renamings, name)

    return rename


def rename_modules(modules: Iterable[str], rename: Callable[[str], str]) -> list[str]:
    """Apply a renaming of tensors to the modules that have them."""
    return [rename(f"{module}.weight").removesuffix(".weight") for module in modules]


def _reversed(renaming: WeightRenaming) -> WeightRenaming:
    reverse = renaming.reverse_transform()
    assert isinstance(reverse, WeightRenaming)
    return reverse
