"""Everything that can be known to be wrong before hours of calibration are spent on it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus
from compressed_tensors.utils import match_named_modules
from torch import nn

from moeq_plugin.models.moe import MoELayer

_DONE = (QuantizationStatus.FROZEN, QuantizationStatus.COMPRESSED)


def kept_by_default(
    model: nn.Module, layers: list[MoELayer], targets: Iterable[str]
) -> dict[str, str]:
    """Return the names of modules that stay in 16 bit unless targeted by name, with the reason.

    Routers and shared-expert gates are tiny and decide which expert runs; the output embedding is
    where servers expect 16 bits. A target that is a class name, such as ``Linear``, does not
    count as targeting them.

    Args:
        model: the model.
        layers: its MoE layers.
        targets: the targets of the recipe.
    """
    reasons: dict[nn.Module, str] = {}
    for layer in layers:
        for module, reason in ((layer.router, "router"), (layer.shared_gate, "shared-expert gate")):
            if module is not None:
                reasons.update(dict.fromkeys(module.modules(), reason))
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        reasons[output] = "output embedding"
    classes = {type(module).__name__ for module in model.modules()}
    by_name = [target for target in targets if target not in classes]
    asked_for = {module for _, module in match_named_modules(model, by_name)}
    return {
        name: reasons[module]
        for name, module in match_named_modules(model, targets)
        if module in reasons and module not in asked_for
    }


def check_data(calib: Any, modifier: str, *, has_experts: bool) -> None:
    """Refuse calibration data that are empty, or missing where the model cannot write its own.

    Args:
        calib: the host's data loader, or ``None``.
        modifier: name of the modifier that asks.
        has_experts: whether the model has MoE layers.

    Raises:
        ValueError: saying what to pass.
    """
    if calib is not None and len(calib) == 0:
        raise ValueError("the calibration data set is empty; expected at least one sequence")
    if calib is None and not has_experts:
        raise ValueError(
            f"{modifier} needs calibration data for a model without experts: pass dataset=... to "
            "oneshot (a datasets.Dataset with `input_ids` or `text`, a DataLoader, or the name of "
            "a data set)"
        )


def check_targets(model: nn.Module, targets: Iterable[str]) -> None:
    """Refuse targets that match no module.

    Raises:
        ValueError: listing every such target with the nearest module and class names.
    """
    names = [name for name, _ in model.named_modules() if name]
    classes = sorted({type(module).__name__ for module in model.modules()})
    lines = []
    for target in sorted(targets):
        if next(match_named_modules(model, [target]), None) is None:
            near = difflib.get_close_matches(target.removeprefix("re:"), names + classes, n=3)
            lines.append(f"  - {target!r}" + (f", did you mean {near}?" if near else ""))
    if lines:
        raise ValueError(
            "These targets match no module of the model; a target is a module name, a class name "
            "or 're:' and a regular expression:\n" + "\n".join(lines)
        )


def check_not_quantized(linears: Mapping[nn.Linear, str] | Mapping[nn.Module, str]) -> None:
    """Refuse modules that hold quantized weights already.

    Args:
        linears: the targeted modules and their names.

    Raises:
        ValueError: listing the first ten of them.
    """
    done = [
        name
        for module, name in linears.items()
        if getattr(module, "quantization_status", None) in _DONE
        or "weight_packed" in module._parameters
    ]
    if done:
        raise ValueError(
            f"{len(done)} of {len(linears)} targeted modules are quantized already, quantizing "
            f"them again would add error to error: {', '.join(done[:10])}. Load the 16-bit "
            "checkpoint, or put these modules into `ignore`."
        )


def check_group_sizes(modules: dict[nn.Module, str]) -> None:
    """Refuse groups that are wider than a weight; the host checks the other indivisible ones.

    Args:
        modules: the modules with their schemes attached, and their names.

    Raises:
        ValueError: listing every offender.
    """
    lines, columns = [], []
    for module, name in modules.items():
        scheme: QuantizationScheme = module.quantization_scheme
        group_size, weight = scheme.weights.group_size, module.weight
        assert isinstance(weight, torch.Tensor)  # what a scheme is attached to has one
        if group_size and group_size > 0 and weight.shape[1] % group_size:
            columns.append(weight.shape[1])
            lines.append(f"  - {name} (columns={columns[-1]}, group_size={group_size})")
    if not lines:
        return
    fitting = [size for size in (128, 64, 32, 16) if not any(c % size for c in columns)]
    advice = f"use group_size {fitting[0]}" if fitting else "use channel-wise weights"
    raise ValueError(
        f"group_size must divide the input columns of every weight; {advice} for these modules, "
        "or put them into `ignore`:\n" + "\n".join(lines)
    )
