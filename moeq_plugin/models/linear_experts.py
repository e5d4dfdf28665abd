"""MoE layers whose experts are linears, which can be quantized, and a refusal of all others.

Experts in a form that nobody takes apart would stay in 16 bit beside quantized attention, and with
them nearly all of the model, without a word.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moeq_plugin.models.moe import MoELayer, UnsupportedModelError, find_moe_layers

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def linear_moe_layers(model: nn.Module) -> list[MoELayer]:
    """Return the MoE layers of a linearized model; empty for a dense one.

    Raises:
        UnsupportedModelError: if it has experts that are no linears, or in no layer known here.
    """
    layers = find_moe_layers(model)
    fused = [layer.name for layer in layers if not isinstance(layer.experts, nn.ModuleList)]
    if fused:
        raise UnsupportedModelError(
            f"llm-compressor does not take the experts of this model apart ({len(fused)} layers, "
            f"such as {fused[0]}); they would stay in 16 bit"
        )
    lone = "" if layers else _unknown_experts(model)
    if lone:
        raise UnsupportedModelError(
            f"{lone} of this model holds experts in a form that is not known here; they would stay "
            "in 16 bit, and routers would not"
        )
    return layers


def _unknown_experts(model: nn.Module) -> str:
    """Return the name of a module that holds experts where no layer has any, empty for none."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    counts: set[Any] = {getattr(text, key, None) for key in _COUNTS} - {None, 0, 1}
    for name, module in model.named_modules():
        stacks = (p for p in module._parameters.values() if p is not None and p.ndim == 3)
        is_stack = not isinstance(module, nn.Conv1d) and any(len(p) in counts for p in stacks)
        if is_stack or name.endswith(".experts"):
            return str(name)
    return ""
