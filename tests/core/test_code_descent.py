import pytest
import torch
from solver_problems import GRID_NAMES, GRIDS, descend, loss, nearest, orders, problem

from moeq_plugin.core.grid import Grid


def brute_force(weight, codes, scale, zero_point, hessian, order, grid):
    """Try every code of the grid at each column in turn, all others fixed, in float64."""
    of_column = grid.group_of_column(weight.shape[2])
    codes = codes.clone()
    possible = torch.arange(grid.lowest, grid.highest + 1)
    for e, row in [(e, row) for e in range(len(weight)) for row in range(weight.shape[1])]:
        s, z = scale[e, row].double()[of_column], zero_point[e, row].double()[of_column]
        for column in order[e].flip(0).tolist():
            tried = codes[e, row].double().repeat(len(possible), 1)
            tried[:, column] = possible.double()
            change = weight[e, row].double() - (tried - z) * s
            losses = ((change @ hessian[e].double()) * change).sum(1)
            codes[e, row, column] = possible[losses.argmin()]
    return codes


@pytest.mark.parametrize("block_size", [1, 5, 64])
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
def test_every_column_is_put_where_it_loses_least(grid, block_size):
    weight, hessian = problem()
    scale, zero_point, codes = nearest(weight, grid)
    order = orders(3, 16)

    found = descend(weight, codes, scale, zero_point, hessian, order, grid, block_size=block_size)

    expected = brute_force(weight, codes, scale, zero_point, hessian, order, grid)
    assert (expected != codes).any()
    assert torch.equal(found, expected)


def test_negative_scales_are_descended_like_positive_ones():
    weight, hessian = problem()
    grid = Grid(2, 4)
    scale, zero_point, codes = nearest(weight, grid)
    scale[:, ::2] *= -1
    order = orders(3, 16)

    found = descend(weight, codes, scale, zero_point, hessian, order, grid)

    assert torch.equal(found, brute_force(weight, codes, scale, zero_point, hessian, order, grid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_no_row_loses_more_and_codes_stay_on_the_grid(seed, dtype):
    weight, hessian = problem(rows=64, seed=seed, dtype=dtype)
    grid = Grid(3, 4)
    scale, zero_point, codes = nearest(weight, grid)
    before = loss(weight, codes, scale, zero_point, hessian, grid)

    for _ in range(3):
        codes = descend(weight, codes, scale, zero_point, hessian, orders(3, 16), grid)
        after = loss(weight, codes, scale, zero_point, hessian, grid)
        assert (after <= before * (1 + 1e-5)).all()
        before = after

    assert codes.dtype == torch.int8
    assert grid.lowest <= codes.min()
    assert codes.max() <= grid.highest


def test_in_the_end_no_single_code_can_be_improved():
    weight, hessian = problem()
    grid = Grid(3, 4)
    scale, zero_point, codes = nearest(weight, grid)
    order = orders(3, 16)
    for _ in range(50):
        codes = descend(weight, codes, scale, zero_point, hessian, order, grid)

    least = loss(weight, codes, scale, zero_point, hessian, grid)

    for column in range(16):
        for step in (-1, 1):
            moved = codes.clone()
            moved[..., column] = (moved[..., column] + step).clamp(grid.lowest, grid.highest)
            other = loss(weight, moved, scale, zero_point, hessian, grid)
            assert (other >= least * (1 - 1e-6)).all()


def test_experts_do_not_mix_and_may_be_relabelled():
    weight, hessian = problem()
    grid = Grid(3, 4)
    arguments = (weight, *reversed(nearest(weight, grid)), hessian, orders(3, 16))
    weight, codes, zero_point, scale, hessian, order = arguments

    def of(experts):
        stack = (weight, codes, scale, zero_point, hessian, order)
        return descend(*(tensor[experts] for tensor in stack), grid)

    together = of([0, 1, 2])

    assert torch.equal(of([1]), together[[1]])
    assert torch.equal(of([2, 0, 1]), together[[2, 0, 1]])


def test_units_change_nothing():
    weight, hessian = problem()
    grid = Grid(3, 4)
    scale, zero_point, codes = nearest(weight, grid)
    order = orders(3, 16)

    expected = descend(weight, codes, scale, zero_point, hessian, order, grid)

    # powers of two are exact
    of_hessian = descend(weight, codes, scale, zero_point, hessian / 1024, order, grid)
    of_weight = descend(8 * weight, codes, 8 * scale, zero_point, hessian, order, grid)
    mirrored = descend(-weight, codes, -scale, zero_point, hessian, order, grid)
    assert torch.equal(of_hessian, expected)
    assert torch.equal(of_weight, expected)
    assert torch.equal(mirrored, expected)


def test_columns_may_be_renamed():
    weight, hessian = problem()
    grid = Grid(3)
    scale, zero_point, codes = nearest(weight, grid)
    order, name = orders(3, 16), torch.randperm(16, generator=torch.Generator().manual_seed(1))

    expected = descend(weight, codes, scale, zero_point, hessian, order, grid)
    renamed = descend(
        weight[..., name],
        codes[..., name],
        scale,
        zero_point,
        hessian[:, name][:, :, name],
        name.argsort()[order],
        grid,
    )

    assert torch.equal(renamed, expected[..., name])
