import pytest
import torch
from solver_problems import GRID_NAMES, GRIDS, output_moments, problem, whole_loss

from moeq_plugin.core.factorization import factorize
from moeq_plugin.core.gptq import round_columns
from moeq_plugin.core.grid import Grid, choose_grid, dequantize, quantize
from moeq_plugin.core.row_feedback import factorize_rows, round_rows


def columns_of(hessian):
    return factorize(hessian.clone(), dampening_frac=0.01, actorder=True)


def rounded(weight, hessian, outputs, grid, row_block=16):
    rows = factorize_rows(outputs.clone())
    columns, (scale, zero_point) = columns_of(hessian), choose_grid(weight, grid)
    return round_rows(weight, columns, rows, scale, zero_point, grid, row_block=row_block)


def best_rest(weight, known, done, hessian, outputs):
    """Return rows that lose least beside those that are rounded, by all normal equations at once.

    In float64, over all weights of all rows to come, with no use of the Kronecker structure.
    """
    rest = [row for row in range(len(weight)) if row not in done]
    lost = (weight[done] - known[done]).flatten()
    system = torch.kron(outputs[rest][:, rest], hessian)
    across = torch.kron(outputs[rest][:, done], hessian)
    change = -torch.linalg.solve(system, across @ lost)
    return rest, weight[rest] - change.view(len(rest), -1)


def brute_force(weight, hessian, outputs, grid, row_block):
    """Round block after block; in between put all rows to come where they lose least."""
    scale, zero_point = choose_grid(weight, grid)
    result = torch.empty_like(weight)
    for e in range(len(weight)):
        damped = outputs[e].double()
        damped = damped + damped.diagonal().mean() * torch.eye(len(damped))
        order = outputs[e].diagonal().argsort(descending=True).tolist()
        target, done = weight[e].double(), []
        columns = columns_of(hessian[[e]])
        # blocks are cut from the end of the ascending order: the first ones are whole
        for start in range(0, len(order), row_block):
            block = order[start : start + row_block][::-1]
            found = round_columns(
                target[None, block].float(),
                columns,
                scale[[e]][:, block],
                zero_point[[e]][:, block],
                grid,
            )
            result[e, block] = found.weight[0]
            done += block
            if len(done) < len(order):
                rest, best = best_rest(
                    weight[e].double(), result[e].double(), done, hessian[e].double(), damped
                )
                target[rest] = best
    return result


@pytest.mark.parametrize("row_block", [1, 2, 4])
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
def test_rows_to_come_go_where_they_lose_least_beside_those_that_are_rounded(grid, row_block):
    weight, hessian = problem()
    outputs = output_moments()

    found = rounded(weight, hessian, outputs, grid, row_block=row_block)

    assert torch.equal(found, brute_force(weight, hessian, outputs, grid, row_block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("diagonal", ["identity", "uneven", "zero"])
def test_outputs_that_do_not_hang_together_give_gptq_bit_for_bit(diagonal, dtype):
    weight, hessian = problem(rows=40, dtype=dtype)
    grid = Grid(3, 4)
    values = {"identity": torch.ones(40), "uneven": torch.rand(40), "zero": torch.zeros(40)}
    outputs = torch.diag(values[diagonal]).repeat(3, 1, 1)

    found = rounded(weight, hessian, outputs, grid)

    plain = round_columns(weight, columns_of(hessian), *choose_grid(weight, grid), grid)
    assert torch.equal(found, plain.weight)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
def test_the_whole_loss_falls_where_outputs_hang_together(grid, seed):
    weight, hessian = problem(rows=64, seed=seed)
    outputs = output_moments(rows=64, seed=seed)

    found = rounded(weight, hessian, outputs, grid)

    plain = round_columns(weight, columns_of(hessian), *choose_grid(weight, grid), grid)
    ours, theirs = (whole_loss(weight, x, hessian, outputs) for x in (found, plain.weight))
    print((ours / theirs).tolist())
    assert (ours < 0.95 * theirs).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS, ids=GRID_NAMES)
def test_weights_are_on_their_grids(grid, dtype):
    weight, hessian = problem(rows=40, dtype=dtype)
    scale, zero_point = choose_grid(weight, grid)

    found = rounded(weight, hessian, output_moments(rows=40), grid)

    codes = quantize(found, scale, zero_point, grid)
    assert torch.equal(dequantize(codes, scale, zero_point, grid), found)
    assert found.dtype == dtype


def test_an_expert_does_not_feel_its_neighbours():
    weight, hessian = problem(rows=40)
    outputs, grid = output_moments(rows=40), Grid(3, 4)

    together = rounded(weight, hessian, outputs, grid)

    for e in range(3):
        alone = rounded(weight[[e]], hessian[[e]], outputs[[e]], grid)
        torch.testing.assert_close(together[[e]], alone)


def test_units_of_gradients_change_nothing():
    weight, hessian = problem(rows=40)
    outputs, grid = output_moments(rows=40), Grid(3, 4)

    once = rounded(weight, hessian, outputs, grid)
    scaled = rounded(weight, hessian, outputs * 2.0**-40, grid)

    assert torch.equal(once, scaled)


def test_rows_may_be_renamed():
    weight, hessian = problem(rows=40)
    outputs, grid = output_moments(rows=40), Grid(3, 4)
    name = torch.randperm(40, generator=torch.Generator().manual_seed(1))

    expected = rounded(weight, hessian, outputs, grid)[:, name]
    renamed = rounded(weight[:, name], hessian, outputs[:, name][:, :, name], grid)

    torch.testing.assert_close(renamed, expected)


def test_what_cannot_be_factorized_gives_gptq():
    weight, hessian = problem()
    outputs, grid = output_moments(), Grid(3, 4)
    outputs[1] = torch.eye(6)
    outputs[1, 0, 1] = outputs[1, 1, 0] = 1e6

    found = rounded(weight, hessian, outputs, grid, row_block=2)

    plain = round_columns(weight, columns_of(hessian), *choose_grid(weight, grid), grid)
    assert torch.equal(found[1], plain.weight[1])
    assert not torch.equal(found[0], plain.weight[0])
