"""Improve codes one column at a time, all others held where they are.

GPTQ decides a column before those behind it are known. Once all are, the loss ``d @ H @ d`` of a
row is a parabola in each of its weights, whose least point on the grid is the point nearest to
``q_j + (d @ H)_j / H_jj``: exact coordinate descent, in which no step raises the loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moeq_plugin.core.column_order import by_expert, in_place, in_turn
from moeq_plugin.core.grid import Grid, nearest_code, point_of_code
from moeq_plugin.core.rounded import Rounded


def descend_codes(
    rounded: Rounded,
    hessian: torch.Tensor,
    order: torch.Tensor,
    grid: Grid,
    *,
    block_size: int = 128,
) -> Rounded:
    """Put every column where it loses least, once, in turn.

    Args:
        rounded: what to improve, for that Hessian.
        hessian: ``[experts, in, in]`` float with a positive diagonal.
        order: ``[experts, in]``, columns in turn, from the end as the solver takes them.
        grid: the grid's description.
        block_size: columns whose updates are applied to the rest at once; speed only.

    Returns:
        Other codes on the same grid.
    """
    codes = in_turn(rounded.codes, order).to(hessian.dtype)
    pull = in_turn(rounded.pull, order)
    group = grid.group_of_column(order.shape[1]).to(order.device)[order]
    for end in range(order.shape[1], 0, -block_size):
        block = slice(max(0, end - block_size), end)
        of_block = torch.stack(
            [h.index_select(0, o[block]).index_select(1, o) for h, o in by_expert(hessian, order)]
        )
        moved = _descend_block(
            codes[:, block],
            pull[:, block].clone(),
            in_turn(rounded.scale, group[:, block]),
            in_turn(rounded.zero_point, group[:, block]),
            of_block[:, :, block],
            grid,
        )
        pull.baddbmm_(of_block.transpose(1, 2), moved, alpha=-1)
    codes = codes.to(torch.int8)
    return replace(rounded, codes=in_place(codes, order), pull=in_place(pull, order))


def _descend_block(
    codes: torch.Tensor,
    pull: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Descend along the columns of a block, last first.

    Args:
        codes: ``[experts, block, out]``, improved in place.
        pull: ``[experts, block, out]``, ``d @ H``; used up.
        scale: ``[experts, block, out]``, of each column.
        zero_point: likewise.
        hessian: ``[experts, block, block]``.
        grid: the grid's description.

    Returns:
        ``[experts, block, out]``, how far each weight has moved.
    """
    moved = torch.empty_like(pull)
    diagonal = hessian.diagonal(dim1=1, dim2=2)[..., None]
    for i in range(codes.shape[1] - 1, -1, -1):
        s, z = scale[:, i], zero_point[:, i]
        point = point_of_code(codes[:, i], s, z).to(pull.dtype)
        target = point + pull[:, i] / diagonal[:, i]
        found = nearest_code(target, s, z, grid).to(codes.dtype)
        move = point_of_code(found, s, z).to(pull.dtype) - point
        # points rounded to few bits of mantissa are not quite evenly spaced: a step must pay
        pays = move.abs() < 2 * (target - point).abs()
        codes[:, i] = torch.where(pays, found, codes[:, i])
        moved[:, i] = move.mul_(pays)
        pull[:, :i].addcmul_(hessian[:, i, :i, None], moved[:, i, None], value=-1)
    return moved
