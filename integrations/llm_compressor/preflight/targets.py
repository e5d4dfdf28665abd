"""What a recipe may target: names that exist, and what stays in 16 bit unless it is named."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from compressed_tensors.utils import match_named_modules
from loguru import logger
from torch import nn

from moeq_plugin.core.names import MIXTRAL_BLOCK, MIXTRAL_PROJECTIONS, canonical
from moeq_plugin.core.small_linears import small_kind
from moeq_plugin.models.moe import MoELayer
from moeq_plugin.models.towers import tower_modules

_OURS = {theirs: ours for ours, theirs in MIXTRAL_PROJECTIONS.items()}


def kept_by_default(
    model: nn.Module, layers: list[MoELayer], targets: Iterable[str]
) -> dict[str, str]:
    """Return the names of modules that stay in 16 bit unless targeted by name, with the reason.

    Routers and shared-expert gates are tiny and decide which expert runs; the output embedding is
    where servers expect 16 bits; text that calibrates does not reach the towers of a multi-modal
    model; others are small and left alone by published recipes (:func:`small_kind`). A target that
    is a class name, such as ``Linear``, does not count as targeting them.

    Args:
        model: the model.
        layers: its MoE layers.
        targets: the targets of the recipe.
    """
    reasons: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        kind = small_kind(name) if isinstance(module, nn.Linear) else None
        if kind is not None:
            reasons[module] = kind.value
    reasons |= dict.fromkeys(tower_modules(model), "tower or projector")
    for layer in layers:
        for module, reason in ((layer.router, "router"), (layer.shared_gate, "shared-expert gate")):
            if module is not None:
                reasons.update(dict.fromkeys(module.modules(), reason))
    output = getattr(model, "get_output_embeddings", lambda: None)()
    # of a model that classifies, what stands beside all of its layers
    heads = model.children() if output is None else (output,)
    reasons |= dict.fromkeys((m for m in heads if isinstance(m, nn.Linear)), "output embedding")
    classes = {type(module).__name__ for module in model.modules()}
    by_name = [target for target in targets if target not in classes]
    asked_for = {module for _, module in match_named_modules(model, by_name)}
    return {
        name: reasons[module]
        for name, module in match_named_modules(model, targets)
        if module in reasons and module not in asked_for
    }


def check_targets(model: nn.Module, targets: Iterable[str]) -> None:
    """Refuse targets that match no module.

    Raises:
        ValueError: listing every such target with the nearest module and class names.
    """
    lines = _unmatched(model, targets)
    if lines:
        raise ValueError(
            "These targets match no module of the model; a target is a module name, a class name "
            "or 're:' and a regular expression:\n" + "\n".join(lines)
        )


def warn_of_ignored(model: nn.Module, ignore: Iterable[str]) -> None:
    """Name entries of ``ignore`` that match no module, so that what they mean gets quantized."""
    lines = _unmatched(model, ignore)
    if lines:
        logger.warning(
            "These entries of `ignore` match no module of the model, and leave nothing out:\n"
            + "\n".join(lines)
        )


def _unmatched(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Return a line for each pattern that matches nothing, with the nearest that there is."""
    names = [name for name, _ in model.named_modules() if name]
    classes = sorted({type(module).__name__ for module in model.modules()})
    lines = []
    for pattern in sorted(patterns):
        if next(match_named_modules(model, [pattern]), None) is not None:
            continue
        # files call modules as they always were called, and users copy names from there
        ours = _respelled(pattern)
        if ours != pattern and next(match_named_modules(model, [ours]), None) is not None:
            lines.append(f"  - {pattern!r} is spelled as in checkpoints, the model says {ours!r}")
            continue
        near = difflib.get_close_matches(pattern.removeprefix("re:"), names + classes, n=3)
        lines.append(f"  - {pattern!r}" + (f", did you mean {near}?" if near else ""))
    return lines


def _respelled(pattern: str) -> str:
    """Return a name, or a regular expression of names, in the spelling of modules."""
    if not pattern.startswith("re:"):
        return canonical(pattern)
    for theirs, ours in ((MIXTRAL_BLOCK, "mlp"), *_OURS.items()):
        pattern = re.sub(rf"\b{theirs}\b", ours, pattern)
    return pattern
