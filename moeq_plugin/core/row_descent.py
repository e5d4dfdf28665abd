"""Refit scales and improve codes where rows make up for each other.

With all other rows held, the loss ``trace(G @ D @ H @ D.T)`` of a row is that of plain GPTQ for
another target: ``q_i + (G @ D)_i / G_ii``, the point at which it would make up for all of them.
"""

from __future__ import annotations

import torch

from moeq_plugin.core.code_descent import descend_codes
from moeq_plugin.core.grid import Grid, dequantize
from moeq_plugin.core.rounded import Rounded
from moeq_plugin.core.scale_refit import refit_scales


def descend_rows(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    hessian: torch.Tensor,
    output_moments: torch.Tensor,
    order: torch.Tensor,
    grid: Grid,
    *,
    row_block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales after each row has been refitted and descended once, in blocks.

    Rows of a block move together as if the others of the block stood still; an expert keeps what a
    block has done only if its loss falls.

    Args:
        weight: ``[experts, out, in]``.
        codes: ``[experts, out, in]`` to start from.
        scale: ``[experts, out, groups]``, not 0.
        zero_point: ``[experts, out, groups]``, fixed.
        hessian: ``[experts, in, in]`` float, positive definite.
        output_moments: ``[experts, out, out]`` float, positive definite.
        order: ``[experts, in]``, columns in turn, from the end as the solver takes them.
        grid: the grid's description.
        row_block: how many rows move together, see
            :func:`moeq_plugin.core.row_feedback.rows_at_once`.

    Returns:
        ``[experts, out, in]`` int8 and ``[experts, out, groups]`` in the dtype of ``scale``.
    """
    codes, scale = codes.clone(), scale.clone()
    points = dequantize(codes, scale, zero_point, grid).to(hessian.dtype)
    change = weight.to(hessian.dtype) - points
    num_rows = codes.shape[1]
    stride = -(-num_rows // row_block)
    for first in range(stride):
        rows = slice(first, num_rows, stride)  # spread out: neighbours are the most alike
        of_rows = output_moments[:, rows]
        pull = of_rows @ change
        own = of_rows[:, :, rows]
        target = points[:, rows] + pull / own.diagonal(dim1=1, dim2=2)[..., None]
        before = Rounded.of(
            target, codes[:, rows], scale[:, rows], zero_point[:, rows], hessian, grid
        )
        after = descend_codes(refit_scales(target, before, hessian, grid), hessian, order, grid)
        moved = after.points(grid).to(hessian.dtype) - points[:, rows]
        moved_by_hessian = before.pull - after.pull
        falls = ((own @ moved - 2 * pull) * moved_by_hessian).sum((1, 2)) < 0
        moved *= falls[:, None, None]
        change[:, rows] -= moved
        points[:, rows] += moved
        codes[:, rows] = torch.where(falls[:, None, None], after.codes, codes[:, rows])
        scale[:, rows] = torch.where(falls[:, None, None], after.scale, scale[:, rows])
    return codes, scale
