import math

import pytest
import torch
from solver_problems import problem

from moeq_plugin.core import scale_search
from moeq_plugin.core.grid import Grid, choose_grid, grid_of_range, quantize
from moeq_plugin.core.scale_search import (
    NARROW,
    power_cost,
    quadratic_cost,
    search_scales,
    weighted_cost,
    wide,
)


def costs(hessian):
    """The three measures, each beside what it means for one group in float64."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)

    def power(error, e, columns):
        return error.abs().pow(2.4).sum()

    def weighted(error, e, columns):
        return (error.square() * diagonal[e, columns].double()).sum()

    def quadratic(error, e, columns):
        return error @ hessian[e, columns][:, columns].double() @ error

    return {
        "power": (power_cost(2.4), power),
        "weighted": (weighted_cost(diagonal, 4), weighted),
        "quadratic": (quadratic_cost(hessian, 4), quadratic),
    }


def both_around(low, high, grid):
    """The scale that just reaches, with the two integers around the exact zero point."""
    scale, _ = grid_of_range(low, high, grid)
    exact = float(grid.lowest - low / scale)
    around = {math.floor(exact), math.ceil(exact)}
    return [(scale, min(max(z, grid.lowest), grid.highest)) for z in around]


@pytest.mark.parametrize("cost", ["power", "weighted", "quadratic"])
@pytest.mark.parametrize(("symmetric", "signed"), [(True, False), (True, True), (False, False)])
def test_no_candidate_would_have_cost_less(cost, symmetric, signed):
    weight, hessian = problem(dtype=torch.bfloat16)
    grid = Grid(3, 4, symmetric=symmetric)
    measure, brute_force = costs(hessian)[cost]

    scale, zero_point = search_scales(weight, grid, wide(3), measure, signed=signed)

    assert scale.dtype == torch.bfloat16
    for e, row, k in [(e, r, k) for e in range(3) for r in range(6) for k in range(4)]:
        columns = torch.arange(4 * k, 4 * k + 4)
        group = weight[e, row, columns]
        low, high = group.min().clamp(max=0), group.max().clamp(min=0)

        def cost_of(s, z, group=group, e=e, columns=columns):
            codes = (group.double() / s.double() + z).round().clamp(grid.lowest, grid.highest)
            points = ((codes - z).bfloat16() * s).double()
            return brute_force(group.double() - points, e, columns)

        tried = [grid_of_range(low * share, high * share, grid) for share in wide(3)]
        if signed:
            tried += [(-s, z) for s, z in tried]
        if not symmetric:
            tried = [of for share in wide(3) for of in both_around(low * share, high * share, grid)]
        least = min(float(cost_of(s, z)) for s, z in tried)
        found = float(cost_of(scale[e, row, k], zero_point[e, row, k]))
        assert found <= least * 1.001


def test_positive_unless_the_sign_is_free():
    weight, _ = problem()

    positive, _ = search_scales(weight, Grid(2, 4), NARROW, power_cost(2.4))
    free, _ = search_scales(weight, Grid(2, 4), NARROW, power_cost(2.4), signed=True)

    assert (positive > 0).all()
    assert 0.2 < (free < 0).float().mean() < 0.8


def test_a_free_sign_mirrors_with_the_weights():
    weight, _ = problem()
    weight = weight + 0.1  # no ties between the signs

    scale, _ = search_scales(weight, Grid(2, 4), NARROW, power_cost(2.4), signed=True)
    mirrored, _ = search_scales(-weight, Grid(2, 4), NARROW, power_cost(2.4), signed=True)

    used = quantize(weight, scale, torch.zeros_like(scale), Grid(2, 4)) == -2
    uses_the_lone_code = used.unflatten(2, (4, 4)).any(3)  # or both signs would do
    assert uses_the_lone_code.any()
    assert torch.equal(mirrored[uses_the_lone_code], -scale[uses_the_lone_code])


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_whole_range_alone_is_the_min_max_rule(symmetric):
    weight, _ = problem()
    grid = Grid(3, 4, symmetric=symmetric)

    scale, zero_point = search_scales(weight, grid, [1.0], power_cost(2.0))

    expected = choose_grid(weight, grid)
    assert torch.equal(scale, expected[0])
    assert torch.equal(zero_point, expected[1])


def test_a_row_of_zeros_has_a_scale():
    scale, _ = search_scales(torch.zeros(1, 1, 4), Grid(3), NARROW, power_cost(2.4))

    assert (scale > 0).all()


@pytest.mark.parametrize("in_cache", [1, 100])
def test_rows_may_be_taken_in_parts(in_cache, monkeypatch):
    weight, hessian = problem()
    grid, shares = Grid(3, 4), wide(3)
    for cost, _ in costs(hessian).values():
        expected = search_scales(weight, grid, shares, cost, signed=True)
        with monkeypatch.context() as patch:
            patch.setattr(scale_search, "_IN_CACHE", in_cache)
            found = search_scales(weight, grid, shares, cost, signed=True)
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_experts_do_not_mix():
    weight, hessian = problem()
    grid = Grid(3, 4)

    together, _ = search_scales(weight, grid, wide(3), quadratic_cost(hessian, 4))
    alone, _ = search_scales(weight[1:2], grid, wide(3), quadratic_cost(hessian[1:2], 4))

    assert torch.equal(together[1:2], alone)


def test_units_change_nothing():
    weight, hessian = problem()
    grid = Grid(3, 4)

    expected, _ = search_scales(weight, grid, wide(3), quadratic_cost(hessian, 4))
    of_hessian, _ = search_scales(weight, grid, wide(3), quadratic_cost(hessian / 1024, 4))
    of_weight, _ = search_scales(8 * weight, grid, wide(3), quadratic_cost(hessian, 4))

    assert torch.equal(of_hessian, expected)
    assert torch.equal(of_weight, 8 * expected)


@pytest.mark.parametrize(
    ("grid", "shares", "signed", "message"),
    [
        (Grid(3), [], False, "shares must be positive"),
        (Grid(3), [1.0, 0.0], False, "shares must be positive"),
        (Grid(3, symmetric=False), [1.0], True, "no use for the sign"),
    ],
    ids=["none", "zero", "asymmetric"],
)
def test_refuses(grid, shares, signed, message):
    with pytest.raises(ValueError, match=message):
        search_scales(torch.zeros(1, 1, 4), grid, shares, power_cost(2.4), signed=signed)
