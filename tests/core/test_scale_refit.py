import pytest
import torch
from solver_problems import GRID_NAMES, GRIDS, loss, nearest, problem, refit

from moeq_plugin.core import scale_refit
from moeq_plugin.core.grid import Grid


def least_squares(weight, codes, zero_point, hessian, grid):
    """Return the best scales by a least-squares solver in float64, row by row."""
    of_column = grid.group_of_column(weight.shape[2])
    found = torch.empty(zero_point.shape, dtype=torch.float64)
    for e in range(len(weight)):
        root = torch.linalg.cholesky(hessian[e].double())
        for row in range(weight.shape[1]):
            steps = codes[e, row].double() - zero_point[e, row].double()[of_column]
            parts = torch.stack([steps * (of_column == k) for k in range(zero_point.shape[2])])
            system, target = (parts @ root).T, weight[e, row].double() @ root
            found[e, row] = torch.linalg.lstsq(system, target[:, None]).solution[:, 0]
    return found


@pytest.mark.parametrize("grid", [*GRIDS, Grid(3, 2)], ids=[*GRID_NAMES, "g2"])
def test_scales_are_those_of_least_squares(grid):
    weight, hessian = problem()
    scale, zero_point, codes = nearest(weight, grid)
    codes[codes == zero_point[..., grid.group_of_column(16)]] = 1  # every group has a say

    found = refit(weight, codes, scale, zero_point, hessian, grid)

    expected = least_squares(weight, codes, zero_point, hessian, grid).float()
    keeps = (expected <= 0).any(2)  # of another sign: that group's scale stays
    assert keeps.float().mean() < 0.5
    torch.testing.assert_close(found[~keeps], expected[~keeps], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
def test_no_row_loses_more_with_scales_as_they_are_stored(grid, dtype):
    weight, hessian = problem(rows=64, dtype=dtype)
    scale, zero_point, codes = nearest(weight, grid)

    found = refit(weight, codes, scale, zero_point, hessian, grid)

    assert found.dtype == dtype
    assert (found > 0).all()
    before = loss(weight, codes, scale, zero_point, hessian, grid)
    after = loss(weight, codes, found, zero_point, hessian, grid)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < before.sum()


def test_what_cannot_be_improved_stays_bit_for_bit():
    weight, hessian = problem(dtype=torch.bfloat16)
    grid = Grid(4, 4)
    scale, zero_point, codes = nearest(weight, grid)
    once = refit(weight, codes, scale, zero_point, hessian, grid)

    twice = refit(weight, codes, once, zero_point, hessian, grid)

    settled = refit(weight, codes, twice, zero_point, hessian, grid)
    assert torch.equal(settled, twice)


def test_a_row_without_any_code_keeps_its_scales():
    weight, hessian = problem()
    grid = Grid(4, 4)
    scale, zero_point, codes = nearest(weight, grid)
    codes[0, 0] = 0
    codes[1, :, :4] = 0

    found = refit(weight, codes, scale, zero_point, hessian, grid)

    assert torch.equal(found[0, 0], scale[0, 0])
    assert torch.equal(found[1, :, 0], scale[1, :, 0])
    assert (found[1, :, 1:] != scale[1, :, 1:]).any()  # other groups of such rows do not
    assert found.isfinite().all()


def test_a_scale_keeps_its_sign():
    weight, hessian = problem()
    grid = Grid(2, 4)
    scale, zero_point, codes = nearest(weight, grid)

    found = refit(-weight, codes, -scale, zero_point, hessian, grid)

    assert torch.equal(found, -refit(weight, codes, scale, zero_point, hessian, grid))
    assert (found < 0).all()
    turned = refit(-weight, codes, scale, zero_point, hessian, grid)
    assert (turned > 0).all()


@pytest.mark.parametrize("in_cache", [1, 16 * 5, 16 * 48 * 2, 2**20])
def test_experts_do_not_mix_and_rows_neither(in_cache, monkeypatch):
    monkeypatch.setattr(scale_refit, "_IN_CACHE", in_cache)
    weight, hessian = problem(rows=48)
    grid = Grid(3, 2)
    scale, zero_point, codes = nearest(weight, grid)

    together = refit(weight, codes, scale, zero_point, hessian, grid)

    alone = refit(
        weight[1:2, 7:8], codes[1:2, 7:8], scale[1:2, 7:8], zero_point[1:2, 7:8], hessian[1:2], grid
    )
    torch.testing.assert_close(together[1:2, 7:8], alone, rtol=1e-4, atol=1e-5)
    turned = refit(
        *(tensor.flip(0) for tensor in (weight, codes, scale, zero_point, hessian)), grid
    )
    torch.testing.assert_close(turned, together.flip(0), rtol=1e-4, atol=1e-5)


def test_units_change_nothing():
    weight, hessian = problem()
    grid = Grid(3, 4)
    scale, zero_point, codes = nearest(weight, grid)

    expected = refit(weight, codes, scale, zero_point, hessian, grid)

    # powers of two are exact
    of_hessian = refit(weight, codes, scale, zero_point, hessian / 1024, grid)
    of_weight = refit(8 * weight, codes, 8 * scale, zero_point, hessian, grid)
    assert torch.equal(of_hessian, expected)
    assert torch.equal(of_weight, 8 * expected)
