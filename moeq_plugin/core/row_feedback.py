"""GPTQ whose rows make up for each other too, where outputs do not count one by one.

What a change ``D`` of a weight does to the model's prediction is ``trace(G @ D @ H @ D.T) / 2`` to
second order, with ``H`` the second moments of the inputs and ``G`` those of the gradients at the
outputs, taken to be independent (a Kronecker-factored Fisher matrix, arXiv:1503.05671). Plain GPTQ
is ``G = 1``: rows are rounded apart. Here blocks of rows are rounded one after the other, and what
a block loses is made up for, as far as ``G`` allows, by the rows that are still to come.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moeq_plugin.core.factorization import Factorization, factorize
from moeq_plugin.core.gptq import round_columns
from moeq_plugin.core.grid import Grid

_LEAST_ROWS, _MOST_BLOCKS = 16, 32
_DAMPENING_FRAC = 1.0  # less pays to second order, and not where much is lost


def factorize_rows(output_moments: Sequence[torch.Tensor]) -> Factorization:
    """Order and factorize second moments of gradients: the row that matters most comes first.

    Args:
        output_moments: for each expert ``[out, out]``; zeros on the diagonal are overwritten. Where
            all are zero, or nothing can be factorized, rows are rounded apart.
    """
    return factorize(output_moments, dampening_frac=_DAMPENING_FRAC, actorder=True)


def rows_at_once(num_rows: int) -> int:
    """Return how many rows are rounded together, which do not make up for each other.

    The wider the weight, the more: each block goes through all columns one by one, so that blocks
    of a fixed size would take time in proportion to rows times columns, however fast the device.

    Example:
        >>> rows_at_once(512), rows_at_once(14336)
        (16, 448)
    """
    return max(_LEAST_ROWS, -(-num_rows // _MOST_BLOCKS))


def round_rows(
    weight: torch.Tensor,
    columns: Factorization,
    rows: Factorization,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grid: Grid,
    *,
    block_size: int = 128,
    row_block: int,
) -> torch.Tensor:
    """Round blocks of rows along a factorization of inputs and one of outputs.

    Each block is rounded by :func:`moeq_plugin.core.gptq.round_columns`. The rows to come move to
    where ``trace(G @ D @ H @ D.T)`` is least with the rounded ones fixed, whatever ``H`` is.

    Args:
        weight: ``[experts, out, in]``, any float dtype; not modified.
        columns: of the second moments of inputs.
        rows: of those of gradients, see :func:`factorize_rows`.
        scale: ``[experts, out, groups]``, not 0.
        zero_point: ``[experts, out, groups]``.
        grid: the grid's description.
        block_size: see :func:`moeq_plugin.core.gptq.solve`.
        row_block: how many rows are rounded together, see :func:`rows_at_once`.

    Returns:
        ``[experts, out, in]`` weights on their grids, in the scale's dtype.
    """
    target = weight.float().gather(1, _of_rows(rows.order, weight))
    result = torch.empty(weight.shape, dtype=scale.dtype, device=weight.device)
    for end in range(weight.shape[1], 0, -row_block):
        start = max(0, end - row_block)
        members = rows.order[:, start:end]
        of_groups = _of_rows(members, scale)
        rounded = round_columns(
            target[:, start:end],
            columns,
            scale.gather(1, of_groups),
            zero_point.gather(1, of_groups),
            grid,
            block_size=block_size,
        ).weight
        result.scatter_(1, _of_rows(members, weight), rounded)
        lost = target[:, start:end] - rounded.float()
        within = rows.factor[:, start:end, start:end].transpose(1, 2)
        passed = torch.linalg.solve_triangular(within, lost, upper=True)
        target[:, :start].baddbmm_(
            rows.factor[:, start:end, :start].transpose(1, 2), passed, alpha=-1
        )
    return result


def _of_rows(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return ``[experts, n]`` as the index that gathers those rows of ``[experts, rows, .]``."""
    return index[..., None].expand(-1, -1, like.shape[2])
