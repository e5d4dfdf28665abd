"""The evaluation program of the comparison: the same 16-bit model, a contender's weights put in.

It believes no contender. A linear that is missing, has another shape, is what it was before or lies
off the grid that was agreed on is refused, so that nobody wins by leaving something in 16 bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moeq_plugin.core.grid import Grid
from moeq_plugin.models.moe import find_moe_layers


class RefusedError(ValueError):
    """What a contender delivered is not what was agreed on."""


def load_reference(path: Path) -> PreTrainedModel:
    """Return the 16-bit model in float32, every expert a module of its own."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    linearize_moe(model)
    return model.eval()


def quantized_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return what every contender has to quantize: all linears but routers, gates and the head."""
    layers = find_moe_layers(model)
    kept = {model.get_output_embeddings()}
    kept |= {layer.router for layer in layers} | {layer.shared_gate for layer in layers}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in kept
    }


def tensors_beside(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return what a contender may change in 16 bit: norms, routers and biases, as AWQ does."""
    kept = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    kept |= {linear.weight for linear in quantized_linears(model).values()}
    return {name: of for name, of in model.named_parameters() if of not in kept}


@torch.no_grad()
def put_in(
    model: PreTrainedModel,
    weights: Mapping[str, torch.Tensor],
    beside: Mapping[str, torch.Tensor],
    grid: Grid,
) -> int:
    """Overwrite all linears of the 16-bit model, and of the rest what is given.

    Args:
        model: as :func:`load_reference` returns it; changed in place.
        weights: dequantized, by the name of the linear.
        beside: what else changed, by the name of the parameter.
        grid: that every weight has to lie on.

    Returns:
        How many tensors beside the linears differ from those of the model.

    Raises:
        RefusedError: naming all linears that were missing, unknown, of another shape, unchanged or
            off the grid; before anything is overwritten.
    """
    linears, others = quantized_linears(model), tensors_beside(model)
    faults = {
        "missing": set(linears) - set(weights),
        "unknown": set(weights) - set(linears) | set(beside) - set(others),
        "of another shape": {n for n in weights if not _fits(weights[n], linears.get(n))}
        | {n for n in beside if n in others and beside[n].shape != others[n].shape},
    }
    _refuse(faults)
    faults = {
        "unchanged": {n for n in weights if torch.equal(weights[n].float(), linears[n].weight)},
        "off the grid": {n for n in weights if not is_on_grid(weights[n], grid)},
        "not finite": {n for n in beside if not beside[n].isfinite().all()},
    }
    _refuse(faults)
    changed = [n for n in beside if not torch.equal(beside[n].float(), others[n])]
    for name, linear in linears.items():
        linear.weight.copy_(weights[name])
    for name in changed:
        others[name].copy_(beside[name])
    return len(changed)


def is_on_grid(weight: torch.Tensor, grid: Grid) -> bool:
    """Return whether every group is integers times a step, within the rounding of its dtype.

    The integers span at most ``2^b - 1``; on a symmetric grid they reach from ``-2^(b-1)`` to
    ``2^(b-1) - 1`` or, with a negative scale, the other way around. A group is the whole row where
    that is narrower.

    Args:
        weight: ``[out, in]``.
        grid: bits, width of a group and symmetry.

    Raises:
        ValueError: if the group size does not divide the columns.
    """
    group_size = min(grid.group_size or weight.shape[1], weight.shape[1])
    if weight.shape[1] % group_size:
        raise ValueError(f"group_size {group_size} must divide the {weight.shape[1]} columns")
    groups = weight.double().reshape(-1, group_size)
    levels = 2**grid.num_bits - 1  # from the least to the largest
    farthest = levels // 2 + 1 if grid.symmetric else levels
    low, high = groups.min(1).values, groups.max(1).values
    known = groups.abs().max(1).values if grid.symmetric else high - low  # a multiple of the step
    # of a product of code and scale, and of the step that is found from it
    tolerance = 2 * farthest * torch.finfo(weight.dtype).eps
    found = known == 0
    for multiple in range(1, farthest + 1):
        codes = groups / (known / multiple)[:, None]
        whole = (codes - codes.round()).abs().max(1).values <= tolerance
        spans = (high - low) / known * multiple
        found |= whole & (spans <= levels + tolerance)  # NaN is neither
    return bool(found.all())


def _fits(weight: torch.Tensor, linear: nn.Linear | None) -> bool:
    return linear is None or weight.shape == linear.weight.shape


def _refuse(faults: Mapping[str, set[str]]) -> None:
    found = [
        f"{len(names)} {fault}: {', '.join(sorted(names)[:3])}{', ...' * (len(names) > 3)}"
        for fault, names in faults.items()
        if names
    ]
    if found:
        raise RefusedError("; ".join(found))
