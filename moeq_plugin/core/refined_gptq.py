"""GPTQ with what may be done about scales before it and about scales and codes after it.

Before: search each group's scale (:mod:`moeq_plugin.core.scale_search`). After: rounds of
refitting scales to codes (:mod:`moeq_plugin.core.scale_refit`) and descending along the codes
(:mod:`moeq_plugin.core.code_descent`). With second moments of gradients at the outputs, rows make
up for each other in all of this (:mod:`moeq_plugin.core.row_feedback`,
:mod:`moeq_plugin.core.row_descent`). All of it sees the same damped Hessian, and what comes out is
on the same kind of grid: only which codes and scales changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moeq_plugin.core.code_descent import descend_codes
from moeq_plugin.core.factorization import Factorization, factorize
from moeq_plugin.core.gptq import Solution, check_shapes, round_columns
from moeq_plugin.core.grid import Grid, quantize
from moeq_plugin.core.rounded import Rounded
from moeq_plugin.core.row_descent import descend_rows
from moeq_plugin.core.row_feedback import factorize_rows, round_rows, rows_at_once
from moeq_plugin.core.scale_refit import refit_scales
from moeq_plugin.core.scale_search import (
    MODERATE,
    NARROW,
    power_cost,
    quadratic_cost,
    search_scales,
    weighted_cost,
    wide,
)
from moeq_plugin.core.solver_options import ScaleSearch, SolverOptions


@dataclass(frozen=True)
class Refined:
    """The result of :func:`solve_refined`.

    Attributes:
        solution: weights, losses and where rounding to nearest was all that worked.
        scale: ``[experts, out, groups]`` that the weights are on; negative only if ``signed``.
        zero_point: ``[experts, out, groups]``.
    """

    solution: Solution
    scale: torch.Tensor
    zero_point: torch.Tensor


def solve_refined(
    weight: torch.Tensor,
    hessians: Sequence[torch.Tensor],
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grid: Grid,
    options: SolverOptions,
    *,
    actorder: bool = True,
    output_moments: Sequence[torch.Tensor] | None = None,
) -> Refined:
    """Round each weight to a grid so that ``trace(D @ H @ D.T)`` stays small.

    Args:
        weight: ``[experts, out, in]``, any float dtype; not modified.
        hessians: as of :func:`moeq_plugin.core.gptq.solve`.
        scale: ``[experts, out, groups]``, positive; a search takes its dtype and nothing else.
        zero_point: ``[experts, out, groups]``.
        grid: the grid's description.
        options: how to.
        actorder: see :func:`moeq_plugin.core.gptq.solve`.
        output_moments: for each expert ``[out, out]`` second moments ``G`` of gradients at the
            outputs, with which ``trace(G @ D @ H @ D.T)`` is what stays small; zeros on the
            diagonal are overwritten, a positive factor per expert changes nothing. ``None`` rounds
            rows apart.

    Returns:
        Weights and the grids that they are on. Without output moments a row's loss is never larger
        than GPTQ's on the same scales.

    Raises:
        ValueError: if shapes disagree.
    """
    check_shapes(weight, hessians, scale)
    factorization = factorize(hessians, dampening_frac=options.dampening_frac, actorder=actorder)
    if options.scale_search is not ScaleSearch.GIVEN:
        found = _search(weight, hessians, factorization, scale.shape[2], grid, options)
        scale, zero_point = found[0].to(scale.dtype), found[1].to(zero_point.dtype)
    if output_moments is not None:
        return _solve_rows(
            weight, hessians, factorization, output_moments, scale, zero_point, grid, options
        )
    solution = round_columns(
        weight, factorization, scale, zero_point, grid, block_size=options.block_size
    )
    if options.rounds == 0:
        return Refined(solution, scale, zero_point)
    hessian, order = factorization.damped(hessians), factorization.order
    del factorization  # as large as the Hessians
    codes = quantize(solution.weight, scale, zero_point, grid)
    is_nearest = solution.is_nearest
    del solution
    rounded = Rounded.of(weight, codes, scale, zero_point, hessian, grid)
    for _ in range(options.rounds):
        rounded = refit_scales(weight, rounded, hessian, grid)
        rounded = descend_codes(rounded, hessian, order, grid)
    rounded = refit_scales(weight, rounded, hessian, grid)
    return _refined(weight, rounded, grid, is_nearest)


def _solve_rows(
    weight: torch.Tensor,
    hessians: Sequence[torch.Tensor],
    columns: Factorization,
    output_moments: Sequence[torch.Tensor],
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    grid: Grid,
    options: SolverOptions,
) -> Refined:
    """Round, refit and descend so that ``trace(G @ D @ H @ D.T)`` stays small."""
    rows = factorize_rows(output_moments)
    row_block = rows_at_once(weight.shape[1])
    points = round_rows(
        weight,
        columns,
        rows,
        scale,
        zero_point,
        grid,
        block_size=options.block_size,
        row_block=row_block,
    )
    hessian, outputs = columns.damped(hessians), rows.damped(output_moments)
    codes = quantize(points, scale, zero_point, grid)
    for _ in range(options.rounds):
        codes, scale = descend_rows(
            weight,
            codes,
            scale,
            zero_point,
            hessian,
            outputs,
            columns.order,
            grid,
            row_block=row_block,
        )
    rounded = Rounded.of(weight, codes, scale, zero_point, hessian, grid)
    return _refined(weight, rounded, grid, columns.is_nearest)


def _refined(
    weight: torch.Tensor, rounded: Rounded, grid: Grid, is_nearest: torch.Tensor
) -> Refined:
    """Return what codes and scales amount to, with the loss of each row."""
    solution = Solution(rounded.points(grid), rounded.losses(weight, grid), is_nearest)
    return Refined(solution, rounded.scale, rounded.zero_point)


def _search(
    weight: torch.Tensor,
    hessians: Sequence[torch.Tensor],
    factorization: Factorization,
    num_groups: int,
    grid: Grid,
    options: SolverOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales and zero points as of :func:`search_scales`."""
    shares = wide(grid.num_bits)
    if options.scale_search is ScaleSearch.NARROW:
        shares, cost = NARROW, power_cost(2.4)
    elif options.scale_search is ScaleSearch.MODERATE:
        shares, cost = MODERATE, power_cost(3.5)
    elif options.scale_search is ScaleSearch.GROUP:
        cost = quadratic_cost(factorization.damped(hessians), num_groups)
    else:
        # 1 / F_jj^2 is the second moment of a column given the columns that come after it, which
        # is what remains of its error once those have made up for it
        conditional = factorization.factor.diagonal(dim1=1, dim2=2).square().reciprocal()
        place = factorization.order.argsort(dim=1)
        cost = weighted_cost(conditional.gather(1, place), num_groups)
    signed = options.signed and grid.symmetric
    return search_scales(weight, grid, shares, cost, signed=signed)
