import pytest
import torch

from moeq_plugin.core import factorization
from moeq_plugin.core.factorization import inverse_factor
from moeq_plugin.core.gptq import solve
from moeq_plugin.core.grid import Grid, choose_grid, dequantize, quantize


def problem(experts=3, rows=6, columns=16, tokens=64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, rows, columns, generator=rng)
    mixing = torch.randn(columns, columns, generator=rng)
    inputs = torch.randn(experts, tokens, columns, generator=rng) @ mixing
    return weight, inputs, 2 * inputs.transpose(1, 2) @ inputs


def nearest(weight, grid):
    scale, zero_point = choose_grid(weight, grid)
    return dequantize(quantize(weight, scale, zero_point, grid), scale, zero_point, grid)


def output_loss(weight, rounded, inputs):
    return ((weight - rounded) @ inputs.transpose(1, 2)).square().sum((1, 2))


def reference(weight, hessian, grid, actorder):
    """The paper's Algorithm 1 for one weight in float64, column by column, nothing blocked."""
    scale, zero_point = choose_grid(weight, grid)
    columns = weight.shape[1]
    W, H = weight.double().clone(), hessian.double().clone()
    H += 0.01 * H.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    order = H.diagonal().argsort(descending=True) if actorder else torch.arange(columns)
    W, H = W[:, order], H[order][:, order]
    group = grid.group_of_column(columns)[order]
    Hinv = torch.linalg.inv(H)
    for i in range(columns):
        s, z = scale[:, group[i]].double(), zero_point[:, group[i]].double()
        code = (W[:, i] / s + z).round().clamp(grid.lowest, grid.highest)
        rounded = (code - z) * s
        error = (W[:, i] - rounded) / Hinv[i, i]
        W -= torch.outer(error, Hinv[i]) * (torch.arange(columns) > i)
        W[:, i] = rounded
        # what remains is the problem without column i: one step of Gaussian elimination
        Hinv = Hinv - torch.outer(Hinv[:, i], Hinv[i]) / Hinv[i, i]
    return W[:, order.argsort()]


@pytest.mark.parametrize("actorder", [True, False], ids=["actorder", "in-order"])
@pytest.mark.parametrize("block_size", [1, 5, 128])
@pytest.mark.parametrize(
    "grid", [Grid(4, 4), Grid(2), Grid(3, 8, symmetric=False)], ids=["g4", "channel", "asymmetric"]
)
def test_rounds_as_the_papers_algorithm_does_in_float64(grid, block_size, actorder):
    weight, _, hessian = problem()
    scale, zero_point = choose_grid(weight, grid)

    solution = solve(
        weight, hessian, scale, zero_point, grid, block_size=block_size, actorder=actorder
    )

    for e in range(3):
        expected = reference(weight[e], hessian[e], grid, actorder).float()
        torch.testing.assert_close(solution.weight[e], expected)


def positions(weight, hessian, rounded, grid):
    """Where each column lies between codes, given what those before it became, in float64."""
    scale, zero_point = (q.double() for q in choose_grid(weight, grid))
    columns = weight.shape[1]
    group = grid.group_of_column(columns)
    W, H = weight.double().clone(), hessian.double()
    Hinv = torch.linalg.inv(H + 0.01 * H.diagonal().mean() * torch.eye(columns).double())
    found = torch.empty_like(W)
    for i in range(columns):
        found[:, i] = W[:, i] / scale[:, group[i]] + zero_point[:, group[i]]
        error = (W[:, i] - rounded[:, i].double()) / Hinv[i, i]
        W -= torch.outer(error, Hinv[i]) * (torch.arange(columns) > i)
        Hinv = Hinv - torch.outer(Hinv[:, i], Hinv[i]) / Hinv[i, i]
    return found


def test_sums_in_another_order_change_codes_at_ties_only():
    """As several processes make them; behind a row's first tie everything may differ."""
    weight, inputs, _ = problem(experts=1, rows=40_000, columns=128, tokens=64)
    parts = [2 * batch.T @ batch for batch in inputs[0].split(2)]
    one = sum(parts)
    several = sum(parts[:20]) + (sum(parts[20:41]) + sum(parts[41:]))
    grid = Grid(4, 16)
    qparams = choose_grid(weight, grid)

    first, second = (
        solve(weight, [hessian.clone()], *qparams, grid, actorder=False).weight[0]
        for hessian in (one, several)
    )

    rows = (first != second).any(1).nonzero().flatten()
    assert 0 < len(rows) < 0.01 * len(first)
    tie = (first != second)[rows].int().argmax(1)
    exact = sum(2 * batch.double().T @ batch.double() for batch in inputs[0].split(2))
    position = positions(weight[0, rows], exact, first[rows], grid).gather(1, tie[:, None])
    assert (position.frac().abs() - 0.5).abs().max() < 1e-4


@pytest.mark.parametrize("columns", [8, 131])
def test_the_factor_is_a_root_of_the_inverse(columns, monkeypatch):
    monkeypatch.setattr(factorization, "_SMALL_TRIANGLE", 40)  # beyond it, by halves
    _, _, hessian = problem(columns=columns)
    order = torch.stack(
        [torch.randperm(columns, generator=torch.Generator().manual_seed(e)) for e in range(3)]
    )

    factor, is_nearest = inverse_factor(hessian, order, dampening_frac=0.01)

    for e in range(3):
        damped = hessian[e][order[e]][:, order[e]]
        damped = damped + 0.01 * hessian[e].diagonal().mean() * torch.eye(columns)
        inverse = torch.linalg.inv(damped.double()).float()
        tolerance = 1e-4 * inverse.abs().max().item()
        torch.testing.assert_close(factor[e].T @ factor[e], inverse, rtol=1e-4, atol=tolerance)
        assert torch.equal(factor[e], factor[e].tril())
    assert not is_nearest.any()


@pytest.mark.parametrize("seed", range(5))
def test_loses_less_output_than_rounding_to_nearest(seed):
    weight, inputs, hessian = problem(seed=seed)
    grid = Grid(3, 8)

    solution = solve(weight, hessian, *choose_grid(weight, grid), grid)

    gptq = output_loss(weight, solution.weight, inputs).sum()
    rtn = output_loss(weight, nearest(weight, grid), inputs).sum()
    assert gptq < 0.8 * rtn


def test_the_loss_is_that_of_the_damped_hessian():
    weight, _, hessian = problem()
    grid = Grid(4, 4)

    solution = solve(weight, hessian, *choose_grid(weight, grid), grid, dampening_frac=0.1)

    change = weight - solution.weight
    damped = hessian + 0.1 * hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(16)
    expected = ((change @ damped) * change).sum(2) / 2
    torch.testing.assert_close(solution.loss, expected, rtol=1e-4, atol=1e-4)


def test_a_factor_on_the_hessian_changes_nothing():
    weight, _, hessian = problem()
    grid = Grid(4, 4)
    qparams = choose_grid(weight, grid)

    once = solve(weight, hessian, *qparams, grid)
    # a power of two is exact in floating point
    scaled = solve(weight, hessian * 2.0**-20, *qparams, grid)

    assert torch.equal(once.weight, scaled.weight)


def test_an_expert_does_not_feel_its_neighbours():
    weight, _, hessian = problem()
    grid = Grid(4, 4)
    scale, zero_point = choose_grid(weight, grid)

    together = solve(weight, hessian, scale, zero_point, grid)
    alone = solve(weight[1:2], hessian[1:2], scale[1:2], zero_point[1:2], grid)

    torch.testing.assert_close(together.weight[1:2], alone.weight)


def test_relabelling_experts_relabels_results():
    weight, _, hessian = problem()
    grid = Grid(4, 4)
    scale, zero_point = choose_grid(weight, grid)

    straight = solve(weight, hessian, scale, zero_point, grid)
    turned = solve(weight.flip(0), hessian.flip(0), scale.flip(0), zero_point.flip(0), grid)

    torch.testing.assert_close(straight.weight, turned.weight.flip(0))


def test_a_diagonal_hessian_leaves_nothing_to_compensate():
    weight, _, _ = problem()
    grid = Grid(3, 4)
    diagonal = torch.diag_embed(torch.rand(3, 16, generator=torch.Generator().manual_seed(3)) + 1)

    solution = solve(weight, diagonal, *choose_grid(weight, grid), grid)

    torch.testing.assert_close(solution.weight, nearest(weight, grid))


def test_a_dead_column_keeps_its_weights():
    weight, inputs, _ = problem()
    inputs[..., 5] = 0
    hessian = 2 * inputs.transpose(1, 2) @ inputs
    grid = Grid(4, 4)

    solution = solve(weight, hessian, *choose_grid(weight, grid), grid)

    assert torch.equal(solution.weight[..., 5], nearest(weight, grid)[..., 5])
    assert not solution.is_nearest.any()


def test_a_dead_column_needs_no_damping():
    weight, inputs, _ = problem()
    inputs[..., 5] = 0
    hessian = 2 * inputs.transpose(1, 2) @ inputs
    grid = Grid(4, 4)
    qparams = choose_grid(weight, grid)

    solution = solve(weight, hessian, *qparams, grid, dampening_frac=0.0)

    assert not solution.is_nearest.any()
    assert torch.equal(solution.weight[..., 5], nearest(weight, grid)[..., 5])


def test_without_any_token_weights_are_rounded_to_nearest():
    weight, _, _ = problem()
    grid = Grid(4, 4)

    solution = solve(weight, torch.zeros(3, 16, 16), *choose_grid(weight, grid), grid)

    torch.testing.assert_close(solution.weight, nearest(weight, grid))


def test_one_token_is_enough_not_to_fail():
    weight, inputs, _ = problem(tokens=1)
    grid = Grid(4, 4)

    solution = solve(weight, 2 * inputs.transpose(1, 2) @ inputs, *choose_grid(weight, grid), grid)

    assert solution.weight.isfinite().all()
    assert not solution.is_nearest.any()


def test_an_indefinite_hessian_falls_back_and_says_so():
    weight, _, hessian = problem()
    hessian[1] = torch.eye(16)
    hessian[1, 0, 1] = hessian[1, 1, 0] = 1e6  # no damping tried can mend this
    grid = Grid(4, 4)

    solution = solve(weight, hessian, *choose_grid(weight, grid), grid)

    assert solution.is_nearest.tolist() == [False, True, False]
    torch.testing.assert_close(solution.weight[1], nearest(weight, grid)[1])


def test_a_mildly_indefinite_hessian_is_mended_by_more_damping():
    weight, _, hessian = problem()
    hessian[1] = torch.eye(16)
    hessian[1, 0, 1] = hessian[1, 1, 0] = 1.05
    grid = Grid(4, 4)

    solution = solve(weight, hessian, *choose_grid(weight, grid), grid)

    assert not solution.is_nearest.any()
    assert solution.weight.isfinite().all()


@pytest.mark.parametrize(
    ("weight", "hessians", "scale", "message"),
    [
        (torch.zeros(4, 8), torch.zeros(1, 8, 8), torch.ones(1, 4, 1), r"\[experts, out, in\]"),
        (torch.zeros(1, 4, 8), torch.zeros(2, 8, 8), torch.ones(1, 4, 1), r"1 hessians \[8, 8\]"),
        (torch.zeros(1, 4, 8), torch.zeros(1, 8, 8), torch.ones(1, 3, 1), r"\[1, 4, groups\]"),
    ],
    ids=["no-stack", "too-many-hessians", "wrong-scale"],
)
def test_refuses(weight, hessians, scale, message):
    with pytest.raises(ValueError, match=message):
        solve(weight, hessians, scale, torch.zeros_like(scale), Grid(4))
