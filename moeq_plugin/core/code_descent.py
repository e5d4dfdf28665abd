"""Improve codes one column at a time, all others held where they are.

GPTQ decides a column before those behind it are known. Once all are, the loss ``d @ H @ d`` of a
row is a parabola in each of its weights, whose least point on the grid is the point nearest to
``q_j + (d @ H)_j / H_jj``: exact coordinate descent, in which no step raises the loss.
"""

from __future__ import annotations

import torch

from moeq_plugin.core.grid import Grid, dequantize, nearest_code, point_of_code


def descend_codes(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    hessian: torch.Tensor,
    order: torch.Tensor,
    grid: Grid,
    *,
    block_size: int = 64,
) -> torch.Tensor:
    """Return codes after every column has been put where it loses least, once, in turn.

    Args:
        weight: ``[experts, out, in]``.
        codes: ``[experts, out, in]`` to start from.
        scale: ``[experts, out, groups]``, fixed.
        zero_point: ``[experts, out, groups]``, fixed.
        hessian: ``[experts, in, in]`` float with a positive diagonal.
        order: ``[experts, in]``, columns in turn, from the end as the solver takes them.
        grid: the grid's description.
        block_size: columns whose updates are applied to the rest at once; speed only.

    Returns:
        ``[experts, out, in]`` int8.
    """
    points = dequantize(codes, scale, zero_point, grid).to(hessian.dtype)
    pull = ((weight.to(hessian.dtype) - points) @ hessian).transpose(1, 2).contiguous()
    codes = codes.to(hessian.dtype).transpose(1, 2).contiguous()  # [experts, in, out]
    scale, zero_point = (q.transpose(1, 2).contiguous() for q in (scale, zero_point))
    of_column = grid.group_of_column(len(order[0])).to(order.device)
    for end in range(order.shape[1], 0, -block_size):
        columns = order[:, max(0, end - block_size) : end]
        of_block = hessian.gather(2, _as_columns(columns, hessian))
        in_turn = codes.gather(1, _as_rows(columns, codes))
        of_groups = _as_rows(of_column[columns], scale)
        moved = _descend_block(
            in_turn,
            pull.gather(1, _as_rows(columns, pull)),
            scale.gather(1, of_groups),
            zero_point.gather(1, of_groups),
            of_block.gather(1, _as_rows(columns, of_block)),
            grid,
        )
        codes.scatter_(1, _as_rows(columns, codes), in_turn)
        pull.baddbmm_(of_block, moved, alpha=-1)
    return codes.transpose(1, 2).to(torch.int8)


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


def _as_rows(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return ``[experts, n]`` as the index that gathers those rows of ``[experts, rows, .]``."""
    return index[..., None].expand(-1, -1, like.shape[2])


def _as_columns(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return ``[experts, n]`` as the index that gathers those columns of ``[experts, ., n]``."""
    return index[:, None].expand(-1, like.shape[1], -1)
