"""The linears that bit allocation decides about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from compressed_tensors.utils import match_named_modules
from torch import nn

from moeq_plugin.integrations.llm_compressor import preflight
from moeq_plugin.models.moe import MoELayer


def target_linears(
    model: nn.Module, layers: list[MoELayer], targets: Iterable[str], ignore: Iterable[str]
) -> dict[nn.Linear, str]:
    """Return the targeted linears and their names, without what stays in 16 bit by default.

    Raises:
        ValueError: if a target matches nothing, or no linear is left.
    """
    targets = list(targets)
    preflight.check_targets(model, targets)
    kept = preflight.kept_by_default(model, layers, targets)
    found = {
        module: name
        for name, module in match_named_modules(model, targets, [*ignore, *kept])
        if isinstance(module, nn.Linear)
    }
    preflight.check_not_quantized(found)
    if not found:
        raise ValueError(f"no linear is left to allocate bits to: targets {targets}")
    return found


def other_bytes(model: nn.Module, names: Mapping[nn.Linear, str]) -> int:
    """Return the bytes of all tensors that a checkpoint holds beside these linears' weights."""
    # by identity: tied weights are one tensor of the file
    ours = {id(linear.weight) for linear in names}
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if id(t) not in ours}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
