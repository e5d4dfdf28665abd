"""Which weights AWQ clips, and by what second moments."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from compressed_tensors.offload import update_offload_parameter
from torch import nn

from moeq_plugin.core.clip import clip_weight
from moeq_plugin.core.grid import Grid
from moeq_plugin.integrations.llm_compressor.schemes import grid_of, weight_args


def clippable(model: nn.Module) -> Iterator[tuple[nn.Linear, Grid]]:
    """Yield linears of MLPs, values and attention outputs that get an integer grid, and the grid.

    Queries and keys are left alone: their errors pass a softmax, of which a linear's own output
    tells nothing (AWQ's code leaves them out too).

    Args:
        model: the model, schemes attached.
    """
    for parent in model.modules():
        for name, child in parent.named_children():
            args = weight_args(child)
            grid = grid_of(args) if args is not None else None
            of_attention = hasattr(parent, "o_proj") and name in ("v_proj", "o_proj")
            is_ours = of_attention or hasattr(parent, "down_proj")
            if is_ours and isinstance(child, nn.Linear) and grid is not None:
                yield child, grid


def clip_linear(
    linear: nn.Linear, grid: Grid, hessian: torch.Tensor, scales: torch.Tensor | None
) -> float | None:
    """Clamp a linear's outliers where that lowers the error of its output, in place.

    Args:
        linear: the linear, smoothed already.
        grid: that its weight will be rounded to.
        hessian: ``[in, in]`` second moments of its inputs before they were smoothed.
        scales: ``[in]``, what its inputs have been divided by since; ``None`` if by nothing.

    Returns:
        The loss as a share of the loss without clipping, ``None`` if there is none to lower.
    """
    if scales is not None:
        scales = scales.to(hessian)
        hessian = hessian / scales / scales[:, None]
    clipped = clip_weight(linear.weight, hessian, grid)
    update_offload_parameter(linear, "weight", clipped.weight)
    before = clipped.loss_unclipped.sum().item()
    return clipped.loss.sum().item() / before if before > 0 else None
