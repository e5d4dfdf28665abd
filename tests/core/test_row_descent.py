import pytest
import torch
from solver_problems import (
    GRID_NAMES,
    GRIDS,
    descend,
    nearest,
    orders,
    output_moments,
    problem,
    refit,
    whole_loss,
)

from moeq_plugin.core.grid import Grid, dequantize
from moeq_plugin.core.row_descent import descend_rows


def brute_force(weight, codes, scale, zero_point, hessian, outputs, order, grid):
    """Row by row: scales by trying the whole loss along each, codes by trying every one.

    In float64 and by the loss of the whole matrix, which knows nothing of targets of a row.
    """
    of_column = grid.group_of_column(weight.shape[2])
    codes, scale = codes.clone(), scale.clone()
    possible = range(grid.lowest, grid.highest + 1)

    def losses(e, codes, scale):
        points = (codes.double() - zero_point[e].double()[:, of_column]) * scale[:, of_column]
        change = weight[e].double() - points
        return (outputs[e].double() @ change @ hessian[e].double() * change).sum()

    for e, row in [(e, row) for e in range(len(weight)) for row in range(weight.shape[1])]:
        of_expert = scale[e].double()
        before = losses(e, codes[e], of_expert)

        def at(values, e=e, row=row):
            tried = scale[e].double()
            tried[row] = values
            return losses(e, codes[e], tried)

        # the loss is a parabola in the scales of a row: its minimum by derivatives
        start = scale[e, row].double()
        gradient = torch.autograd.functional.jacobian(at, start)
        curvature = torch.autograd.functional.hessian(at, start)
        curvature += torch.diag((curvature.diagonal() == 0).double())
        found = (start - torch.linalg.solve(curvature, gradient)).to(scale.dtype)
        found = torch.where(found * scale[e, row] > 0, found, scale[e, row])
        if at(found.double()) < before:
            scale[e, row] = found
        of_expert = scale[e].double()
        for column in order[e].flip(0).tolist():
            tried = [codes[e].clone() for _ in possible]
            for code, of_all in zip(possible, tried, strict=True):
                of_all[row, column] = code
            least = torch.stack([losses(e, of_all, of_expert) for of_all in tried]).argmin()
            codes[e] = tried[int(least)]
    return codes, scale


@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
def test_a_row_is_put_where_the_whole_matrix_loses_least(grid):
    weight, hessian = problem(experts=2)
    scale, zero_point, codes = nearest(weight, grid)
    arguments = (codes, scale, zero_point, hessian, output_moments(experts=2), orders(2, 16), grid)

    found = descend_rows(weight, *arguments, row_block=1)

    expected = brute_force(weight, *arguments)
    assert (expected[0] != codes).any()
    assert (expected[1] != scale).any()
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row_block", [1, 5, 16, 64])
@pytest.mark.parametrize("seed", range(3))
def test_no_expert_loses_more_and_codes_stay_on_the_grid(seed, row_block, dtype):
    weight, hessian = problem(rows=40, seed=seed, dtype=dtype)
    outputs, grid = output_moments(rows=40, seed=seed), Grid(3, 4)
    scale, zero_point, codes = nearest(weight, grid)
    first = before = whole_loss(
        weight, dequantize(codes, scale, zero_point, grid), hessian, outputs
    )

    for _ in range(3):
        codes, scale = descend_rows(
            weight, codes, scale, zero_point, hessian, outputs, orders(3, 16), grid,
            row_block=row_block,
        )  # fmt: skip
        points = dequantize(codes, scale, zero_point, grid)
        after = whole_loss(weight, points, hessian, outputs)
        assert (after <= before * (1 + 1e-5)).all()
        before = after

    # where all rows move at once as if the others stood still, next to nothing is kept
    assert row_block > len(codes[0]) or (before < 0.8 * first).all()
    assert codes.dtype == torch.int8
    assert scale.dtype == dtype
    assert grid.lowest <= codes.min()
    assert codes.max() <= grid.highest


def test_outputs_that_do_not_hang_together_are_refitted_and_descended_apart():
    weight, hessian = problem(rows=40)
    grid, order = Grid(3, 4), orders(3, 16)
    scale, zero_point, codes = nearest(weight, grid)
    apart = torch.diag(torch.rand(40) + 0.1).repeat(3, 1, 1)

    found = descend_rows(
        weight, codes, scale, zero_point, hessian, apart, order, grid, row_block=16
    )

    refitted = refit(weight, codes, scale, zero_point, hessian, grid)
    descended = descend(weight, codes, refitted, zero_point, hessian, order, grid)
    assert torch.equal(found[0], descended)
    torch.testing.assert_close(found[1], refitted)


def test_an_expert_does_not_feel_its_neighbours():
    weight, hessian = problem(rows=40)
    outputs, grid = output_moments(rows=40), Grid(3, 4)
    scale, zero_point, codes = nearest(weight, grid)
    stack = (weight, codes, scale, zero_point, hessian, outputs, orders(3, 16))

    together = descend_rows(*stack, grid, row_block=16)

    for e in range(3):
        alone = descend_rows(*(tensor[[e]] for tensor in stack), grid, row_block=16)
        assert torch.equal(alone[0], together[0][[e]])
        torch.testing.assert_close(alone[1], together[1][[e]])


def test_what_is_given_stays_as_it_was():
    weight, hessian = problem()
    grid = Grid(3, 4)
    scale, zero_point, codes = nearest(weight, grid)
    before = codes.clone(), scale.clone()

    descend_rows(
        weight, codes, scale, zero_point, hessian, output_moments(), orders(3, 16), grid,
        row_block=4,
    )  # fmt: skip

    assert torch.equal(codes, before[0])
    assert torch.equal(scale, before[1])
