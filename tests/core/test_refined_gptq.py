import math

import pytest
import torch
from solver_problems import GRID_NAMES, GRIDS, output_moments, problem, whole_loss

from moeq_plugin.core.factorization import factorize
from moeq_plugin.core.gptq import solve
from moeq_plugin.core.grid import Grid, choose_grid, dequantize, quantize
from moeq_plugin.core.refined_gptq import solve_refined
from moeq_plugin.core.scale_search import search_scales, weighted_cost, wide
from moeq_plugin.core.solver_options import ScaleSearch, SolverOptions

EVERYTHING = SolverOptions(ScaleSearch.NARROW, signed=True, rounds=2, dampening_frac=0.05)


def refined(weight, hessian, grid, options, **more):
    return solve_refined(weight, hessian.clone(), *choose_grid(weight, grid), grid, options, **more)


@pytest.mark.parametrize("actorder", [True, False], ids=["actorder", "in-order"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
def test_by_default_it_is_gptq_bit_for_bit(grid, dtype, actorder):
    weight, hessian = problem(dtype=dtype)
    scale, zero_point = choose_grid(weight, grid)

    found = refined(weight, hessian, grid, SolverOptions(), actorder=actorder)

    plain = solve(weight, hessian.clone(), scale, zero_point, grid, actorder=actorder)
    assert torch.equal(found.solution.weight, plain.weight)
    assert torch.equal(found.solution.loss, plain.loss)
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.zero_point, zero_point)


@pytest.mark.parametrize("search", ScaleSearch)
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
def test_weights_are_on_the_grids_that_come_with_them(grid, search):
    weight, hessian = problem(dtype=torch.bfloat16)
    signed = search is not ScaleSearch.GIVEN

    found = refined(weight, hessian, grid, SolverOptions(search, signed=signed, rounds=2))

    codes = quantize(found.solution.weight, found.scale, found.zero_point, grid)
    stored = dequantize(codes, found.scale, found.zero_point, grid)
    assert torch.equal(stored, found.solution.weight)
    assert found.solution.weight.dtype == found.scale.dtype == torch.bfloat16
    assert (found.scale < 0).any() == (signed and grid.symmetric)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("search", ScaleSearch)
def test_each_round_lowers_the_loss_and_raises_no_rows(search, seed):
    weight, hessian = problem(rows=32, seed=seed)
    grid = Grid(3, 4)

    losses = [
        refined(weight, hessian, grid, SolverOptions(search, rounds=rounds)).solution.loss
        for rounds in range(4)
    ]

    for before, after in zip(losses, losses[1:], strict=False):
        assert (after <= before * (1 + 1e-4)).all()
    assert losses[1].sum() < 0.95 * losses[0].sum()


def test_the_loss_is_that_of_the_damped_hessian():
    weight, hessian = problem()

    found = refined(weight, hessian, Grid(4, 4), EVERYTHING)

    change = weight - found.solution.weight
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    damped = hessian + 0.05 * mean * torch.eye(16)
    expected = ((change @ damped) * change).sum(2) / 2
    torch.testing.assert_close(found.solution.loss, expected, rtol=1e-4, atol=1e-4)


def test_what_was_factorized_is_known_however_much_damping_it_took():
    _, hessian = problem()
    hessian[1] = torch.eye(16)
    hessian[1, 0, 1] = hessian[1, 1, 0] = 1.05  # mended by more damping
    hessian[2] = torch.eye(16)
    hessian[2, 0, 1] = hessian[2, 1, 0] = 1e6  # by none

    damped = factorize(hessian, dampening_frac=0.01, actorder=True).damped(hessian)

    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
    expected = hessian + (mean * torch.tensor([0.01, 0.1, 0.0]))[:, None, None] * torch.eye(16)
    expected[2] = torch.eye(16)
    torch.testing.assert_close(damped, expected, rtol=1e-4, atol=1e-4)


def test_the_conditional_search_weights_a_column_by_what_the_later_ones_leave_of_it():
    weight, hessian = problem()
    grid, experts = Grid(2, 4), range(3)
    order = hessian.diagonal(dim1=1, dim2=2).argsort(1)
    conditional = torch.empty(3, 16, dtype=torch.float64)
    for e in experts:
        damped = hessian[e].double()
        damped = damped + 0.01 * damped.diagonal().mean() * torch.eye(16)
        for place, column in enumerate(order[e].tolist()):
            later = order[e, :place]
            across = damped[column, later]
            explained = across @ torch.linalg.solve(damped[later][:, later], across)
            conditional[e, column] = damped[column, column] - explained

    found = refined(weight, hessian, grid, SolverOptions(ScaleSearch.CONDITIONAL))

    expected, _ = search_scales(weight, grid, wide(2), weighted_cost(conditional.float(), 4))
    assert torch.equal(found.scale, expected)


@pytest.mark.parametrize("options", [SolverOptions(), EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
def test_outputs_that_do_not_hang_together_change_nothing(grid, options):
    weight, hessian = problem(rows=40)
    apart = torch.diag(torch.rand(40) + 0.1).repeat(3, 1, 1)

    found = refined(weight, hessian, grid, options, output_moments=apart)

    without = refined(weight, hessian, grid, options)
    if options.rounds == 0:
        assert torch.equal(found.solution.weight, without.solution.weight)
    # but for the last refit of scales, which rows do without that make up for each other
    tolerance = {"rtol": 0.02 if options.rounds else 1e-4, "atol": 0.0}
    torch.testing.assert_close(
        found.solution.loss.sum(1), without.solution.loss.sum(1), **tolerance
    )


@pytest.mark.parametrize("search", ScaleSearch)
@pytest.mark.parametrize("seed", range(3))
def test_with_outputs_that_hang_together_the_whole_loses_less_each_round(seed, search):
    weight, hessian = problem(rows=40, seed=seed)
    outputs, grid = output_moments(rows=40, seed=seed), Grid(3, 4)
    signed = search is not ScaleSearch.GIVEN

    def losses(rounds, **more):
        options = SolverOptions(search, signed=signed, rounds=rounds)
        found = refined(weight, hessian, grid, options, **more)
        codes = quantize(found.solution.weight, found.scale, found.zero_point, grid)
        points = dequantize(codes, found.scale, found.zero_point, grid)
        assert torch.equal(points, found.solution.weight)
        return whole_loss(weight, points, hessian, outputs)

    by_rounds = [losses(rounds, output_moments=outputs.clone()) for rounds in range(3)]
    assert by_rounds[0].sum() < 0.95 * losses(0).sum()
    assert (by_rounds[1] < by_rounds[0]).all()
    # a round weighs what is damped
    assert (by_rounds[2] <= by_rounds[1] * (1 + 1e-2)).all()
    assert by_rounds[2].sum() < 0.95 * losses(2).sum()


def test_an_expert_does_not_feel_its_neighbours():
    weight, hessian = problem()
    grid = Grid(3, 4)

    together = refined(weight, hessian, grid, EVERYTHING)
    alone = refined(weight[1:2], hessian[1:2], grid, EVERYTHING)
    turned = refined(weight.flip(0), hessian.flip(0), grid, EVERYTHING)

    torch.testing.assert_close(together.solution.weight[1:2], alone.solution.weight)
    torch.testing.assert_close(together.solution.weight, turned.solution.weight.flip(0))


def test_a_factor_on_the_hessian_changes_nothing():
    weight, hessian = problem()

    once = refined(weight, hessian, Grid(3, 4), EVERYTHING)
    scaled = refined(weight, hessian * 2.0**-20, Grid(3, 4), EVERYTHING)

    assert torch.equal(once.solution.weight, scaled.solution.weight)


@pytest.mark.parametrize("search", ScaleSearch)
def test_what_cannot_be_solved_is_rounded_to_nearest_and_said(search):
    weight, hessian = problem()
    hessian[1] = torch.eye(16)
    hessian[1, 0, 1] = hessian[1, 1, 0] = 1e6
    hessian[2] = 0  # no token at all
    grid = Grid(3, 4)

    found = refined(weight, hessian, grid, SolverOptions(search, rounds=2))

    assert found.solution.is_nearest.tolist() == [False, True, False]
    nearest = quantize(weight, found.scale, found.zero_point, grid)
    stored = dequantize(nearest, found.scale, found.zero_point, grid)
    assert found.solution.weight.isfinite().all()
    unlike = found.solution.weight[1:] != stored[1:]
    # the last refit of scales may leave a code whose neighbour has become nearer
    assert unlike.float().mean() < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounds": -1}, "rounds"),
        ({"dampening_frac": math.inf}, "dampening_frac"),
        ({"dampening_frac": -0.1}, "dampening_frac"),
        ({"signed": True}, "signed needs a scale search"),
    ],
)
def test_refuses_options(fields, message):
    with pytest.raises(ValueError, match=message):
        SolverOptions(**fields)


def test_refuses_shapes_as_gptq_does():
    weight = torch.zeros(1, 4, 8)
    scale = torch.ones(1, 3, 1)
    with pytest.raises(ValueError, match=r"\[1, 4, groups\]"):
        solve_refined(
            weight, torch.zeros(1, 8, 8), scale, torch.zeros_like(scale), Grid(4), SolverOptions()
        )
