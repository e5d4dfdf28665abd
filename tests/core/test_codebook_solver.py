"""Codebooks with GPTQ's compensation: laws, and inequalities against simpler methods."""

import pytest
import torch

from moeq_plugin.core.codebook import CodebookFormat, encode
from moeq_plugin.core.codebook_solver import refine_codebooks, solve_codebook
from moeq_plugin.core.factorization import inverse_factor
from moeq_plugin.core.gptq import solve
from moeq_plugin.core.grid import Grid, choose_grid

FORMS = [
    CodebookFormat(3, 1, group_rows=4, group_columns=32),
    CodebookFormat(4, 2, group_rows=24, group_columns=16),
    CodebookFormat(5, 4, group_rows=10, group_columns=24),  # no divisor of the shape below
]
SHAPE = (24, 64)


def problem(shape=SHAPE, seed=0):
    """Return a weight and the inputs of correlated features of different size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(shape[1], shape[1], generator=g) * torch.logspace(-1, 1, shape[1])
    order = torch.randperm(shape[1], generator=g)
    inputs = torch.randn(300, shape[1], generator=g) @ mix[:, order]
    inputs = inputs + torch.randn(300, shape[1], generator=g)
    return torch.randn(shape, generator=g), inputs


def moments(inputs):
    return 2 * inputs.T @ inputs


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_an_identity_hessian_means_rounding_to_nearest(form):
    weight, _ = problem()

    solution = solve_codebook(weight, torch.eye(SHAPE[1]), form, refine_steps=0, dampening_frac=0.0)

    nearest = encode(weight, form)
    assert torch.equal(solution.weight.codes, nearest.codes)
    assert torch.equal(solution.weight.codebook, nearest.codebook)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("refine_steps", [0, 20])
def test_the_loss_is_what_the_inputs_measure(form, refine_steps):
    weight, inputs = problem()

    solution = solve_codebook(weight, moments(inputs), form, refine_steps=refine_steps)

    change = inputs @ (weight - solution.weight.decode()).T
    torch.testing.assert_close(solution.loss, change.square().sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_compensation_beats_nearest_and_refinement_beats_both(form, seed):
    weight, inputs = problem(seed=seed)
    hessian = moments(inputs)

    def loss(quantized):
        difference = quantized - weight
        return (difference @ hessian * difference).sum()

    nearest = loss(encode(weight, form).decode())
    compensated, refined = (
        loss(solve_codebook(weight, hessian.clone(), form, refine_steps=n).weight.decode())
        for n in (0, 20)
    )

    assert compensated < 0.8 * nearest
    assert refined < compensated


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("actorder", [False, True])
def test_a_power_of_two_on_the_hessian_changes_nothing(form, actorder):
    weight, inputs = problem()

    plain, scaled = (
        solve_codebook(weight, factor * moments(inputs), form, actorder=actorder)
        for factor in (1, 2**10)
    )

    assert torch.equal(plain.weight.codes, scaled.weight.codes)
    assert torch.equal(plain.weight.codebook, scaled.weight.codebook)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_vector_is_rounded_where_the_columns_to_come_adapt_best(form):
    """Replay the algorithm in float64 with the codes found: none can be improved alone.

    After the vectors before are fixed, the cost of a centroid is the least loss over all values
    of the columns to come, found here by solving for them. Column groups come from left to right,
    the vectors of a group from right to left.
    """
    weight, inputs = problem()
    hessian = moments(inputs)
    solution = solve_codebook(
        weight, hessian.clone(), form, refine_steps=0, actorder=False, dampening_frac=0.0
    )
    H, D = hessian.double(), (solution.weight.decode() - weight).double()
    centroids = solution.weight.codebook.double() * solution.weight.scale.double()[..., None, None]

    def best_cost(row, vector, value):
        """Return the least loss with all columns before and ``vector`` at ``value``."""
        columns = torch.arange(SHAPE[1])
        group_start = vector.start // form.group_columns * form.group_columns
        group_end = min(SHAPE[1], group_start + form.group_columns)
        is_free = (columns >= group_end) | ((columns >= group_start) & (columns < vector.start))
        fixed, free = columns[~is_free], columns[is_free]
        d = D[row].index_copy(0, columns[vector], value - weight[row, vector].double())[fixed]
        rest = H[free][:, fixed] @ d
        return d @ H[fixed][:, fixed] @ d - rest @ torch.linalg.solve(H[free][:, free], rest)

    for row, done in [(0, 0), (3, 16), (17, 24), (23, 40)]:
        vector = slice(done, done + form.vector_dim)
        table = centroids[row // form.group_rows, done // form.group_columns]
        costs = torch.stack([best_cost(row, vector, value) for value in table])
        chosen = costs[solution.weight.codes[row, done // form.vector_dim].long()]
        assert chosen <= costs.min() * (1 + 1e-3)


def test_codebooks_of_a_uniform_grid_are_scalar_gptq():
    """With as many codebook rows as a grid has, results are no worse than the grid's."""
    ours, theirs = [], []
    for seed in range(4):
        weight, inputs = problem(seed=seed)
        grid = Grid(3, 32, symmetric=False)
        scale, zero_point = choose_grid(weight[None], grid)
        hessian = moments(inputs)
        scalar = solve(weight[None], [hessian.clone()], scale, zero_point, grid, actorder=False)
        form = CodebookFormat(3, 1, group_rows=1, group_columns=32)
        coded = solve_codebook(weight, hessian.clone(), form, actorder=False)
        for results, quantized in ((ours, coded.weight.decode()), (theirs, scalar.weight[0])):
            change = inputs @ (weight - quantized).T
            results.append(change.square().sum().item())

    assert sum(ours) < 0.8 * sum(theirs)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_refinement_finds_the_least_squares_codebooks(form):
    weight, inputs = problem()
    hessian = moments(inputs)
    encoded = encode(weight.double().float(), form)

    refined, _ = refine_codebooks(encoded, weight, hessian, steps=200)

    # at the minimum the gradient of every centroid, summed over its vectors, is zero
    def gradient(code_weight):
        residual = (code_weight.decode() - weight).double() @ hessian.double()
        total = torch.zeros(encoded.codebook.shape, dtype=torch.float64)
        for row in range(SHAPE[0]):
            for v, code in enumerate(code_weight.codes[row].tolist()):
                column = v * form.vector_dim
                group = (row // form.group_rows, column // form.group_columns)
                total[group][code] += residual[row, column : column + form.vector_dim]
        return total.norm()

    # int8 rounding leaves a rest
    assert gradient(refined) < 0.1 * gradient(encoded)
    assert torch.equal(refined.codes, encoded.codes)


def test_refinement_never_raises_the_loss_of_a_row_group():
    weight, inputs = problem()
    hessian = moments(inputs)

    def losses(result, form):
        difference = result.decode() - weight
        rows = (difference @ hessian * difference).sum(1)
        return torch.stack([of_group.sum() for of_group in rows.split(form.group_rows)])

    for form in FORMS:
        encoded = encode(weight, form)
        for steps in (1, 5, 50, 50, 50):  # at the minimum only rounding to int8 is left
            refined, loss = refine_codebooks(encoded, weight, hessian, steps)
            difference = (refined.decode() - weight).double()
            measured = (difference @ hessian.double() * difference).sum(1) / 2
            torch.testing.assert_close(loss.double(), measured, rtol=1e-4, atol=0)
            assert (losses(refined, form) <= losses(encoded, form)).all()
            encoded = refined


def test_column_groups_that_matter_are_rounded_first():
    weight, _ = problem()
    size = torch.ones(64)
    size[40:48] = 100.0  # inside the second group of 32
    mixed = torch.eye(64) + 0.5
    hessian = size[:, None].sqrt() * mixed * size.sqrt()

    ordered = solve_codebook(weight, hessian.clone(), FORMS[0], refine_steps=0)
    natural = solve_codebook(weight, hessian.clone(), FORMS[0], refine_steps=0, actorder=False)

    # what is rounded first is rounded as if it were alone
    swapped = torch.cat([weight[:, 32:], weight[:, :32]], 1)
    index = torch.cat([torch.arange(32, 64), torch.arange(32)])
    expected = solve_codebook(
        swapped, hessian[index][:, index], FORMS[0], refine_steps=0, actorder=False
    )
    assert torch.equal(ordered.weight.codes, expected.weight.codes[:, index])
    assert not torch.equal(natural.weight.codes, ordered.weight.codes)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_dead_column_keeps_its_weights(form):
    weight, inputs = problem()
    inputs[:, 10:14] = 0

    solution = solve_codebook(weight, moments(inputs), form)

    rounded = solution.weight.decode()[:, 10:14]
    assert torch.isfinite(rounded).all()
    assert (rounded - weight[:, 10:14]).square().mean() < weight[:, 10:14].square().mean()


def test_a_hessian_that_cannot_be_factorized_means_rounding_to_nearest():
    weight, _ = problem()
    broken = -torch.ones(64, 64) + 2 * torch.eye(64)
    assert inverse_factor([broken.clone()], torch.arange(64)[None], 0.0)[1]

    solution = solve_codebook(weight, broken, FORMS[0], dampening_frac=0.0)

    assert solution.is_nearest
    assert torch.equal(solution.weight.codes, encode(weight, FORMS[0]).codes)


def test_bfloat16_weights_are_compensated_for_what_a_server_computes():
    weight, inputs = problem()
    weight = weight.bfloat16()

    solution = solve_codebook(weight, moments(inputs), FORMS[0])

    assert solution.weight.decode().dtype == torch.bfloat16
    change = inputs @ (weight.float() - solution.weight.decode().float()).T
    torch.testing.assert_close(solution.loss, change.square().sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("weight", "hessian", "message"),
    [
        (torch.zeros(2, 4), torch.eye(3), r"got \[2, 4\] and \[3, 3\]"),
        (torch.zeros(4), torch.eye(4), r"got \[4\] and \[4, 4\]"),
        (torch.zeros(2, 5), torch.eye(5), "vector_dim 2 must divide the 5 columns"),
    ],
    ids=["hessian", "vector", "columns"],
)
def test_refuses(weight, hessian, message):
    with pytest.raises(ValueError, match=message):
        solve_codebook(weight, hessian, FORMS[1])
