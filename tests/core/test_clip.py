"""Clipping against exhaustive search in float64, and its laws."""

import itertools

import pytest
import torch

from moeq_plugin.core.clip import clip_weight
from moeq_plugin.core.grid import Grid


def weighted_inputs(rng, tokens=64, columns=8):
    inputs = torch.randn(tokens, columns, generator=rng) * torch.rand(columns, generator=rng)
    return inputs, torch.rand(tokens, generator=rng)


def moments(inputs, weights):
    return 2 * (inputs.T * weights) @ inputs


def rounded(values, grid):
    """Round one group to nearest; in float32, since the end of the range is a tie of 3 and 4."""
    values = torch.tensor(values)
    low, high = values.min().clamp(max=0), values.max().clamp(min=0)
    steps = grid.highest - grid.lowest
    scale = max(high, -low) / (steps / 2) if grid.symmetric else (high - low) / steps
    zero = 0 if grid.symmetric else (grid.lowest - low / scale).round()
    codes = (values / scale + zero).round().clamp(grid.lowest, grid.highest)
    return (codes - zero) * scale


def brute_force(row, inputs, weights, grid, ratios):
    """Return the least sum of the groups' own losses over all ratios, and what reaches it."""
    size = grid.group_size or len(row)
    starts = range(0, len(row), size)
    best = (float("inf"), None)
    for choice in itertools.product(ratios, repeat=len(starts)):
        clamped, loss = [], 0.0
        for start, ratio in zip(starts, choice, strict=True):
            group = row[start : start + size]
            values = torch.tensor(group)
            low, high = values.min().clamp(max=0), values.max().clamp(min=0)
            if grid.symmetric:
                low, high = min(low, -high), max(high, -low)
            clamped += values.clamp(low * ratio, high * ratio).tolist()
            change = rounded(clamped[start:], grid) - values
            outputs = inputs[:, start : start + size].double() @ change.double()
            loss += (weights.double() * outputs.square()).sum().item()
        best = min(best, (loss, clamped), key=lambda x: x[0])
    return best


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("seed", range(8))
def test_one_group_is_the_brute_force_optimum(seed, symmetric):
    rng = torch.Generator().manual_seed(seed)
    inputs, token_weights = weighted_inputs(rng)
    weight = torch.randn(4, 8, generator=rng) ** 3  # outliers
    grid, ratios = Grid(3, None, symmetric), (1.0, 0.9, 0.7, 0.5)

    clipped = clip_weight(weight, moments(inputs, token_weights), grid, ratios=ratios)

    for row, ours, loss in zip(weight.tolist(), clipped.weight, clipped.loss, strict=True):
        least, expected = brute_force(row, inputs, token_weights, grid, ratios)
        assert loss.item() == pytest.approx(least, rel=1e-4)
        torch.testing.assert_close(ours, torch.tensor(expected))


def test_groups_that_do_not_see_each_other_are_each_at_their_optimum(rng):
    inputs, token_weights = weighted_inputs(rng)
    alone = torch.kron(torch.eye(2), torch.ones(4, 4))  # no moments between the groups
    weight = torch.randn(6, 8, generator=rng) ** 3
    grid, ratios = Grid(3, 4), (1.0, 0.8, 0.6)

    clipped = clip_weight(weight, moments(inputs, token_weights) * alone, grid, ratios=ratios)

    for row, loss in zip(weight.tolist(), clipped.loss, strict=True):
        least, _ = brute_force(row, inputs, token_weights, grid, ratios)
        assert loss.item() == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_no_row_loses_more_than_without_clipping(seed):
    rng = torch.Generator().manual_seed(seed)
    inputs, token_weights = weighted_inputs(rng, columns=32)
    inputs = inputs + 2 * torch.randn(64, 1, generator=rng)  # groups see the same tokens
    weight = torch.randn(64, 32, generator=rng) ** 3

    clipped = clip_weight(weight, moments(inputs, token_weights), Grid(3, 8))

    change = _round_to_nearest(clipped.weight, Grid(3, 8)) - weight
    measured = (token_weights * (inputs @ change.T).square().T).sum(1)
    torch.testing.assert_close(clipped.loss, measured, rtol=1e-3, atol=1e-4)
    assert (clipped.loss <= clipped.loss_unclipped).all()
    assert (clipped.loss < clipped.loss_unclipped).float().mean() > 0.2
    kept = clipped.loss == clipped.loss_unclipped
    assert torch.equal(clipped.weight[kept], weight[kept])


def _round_to_nearest(weight, grid):
    return torch.stack(
        [
            torch.cat([rounded(group.tolist(), grid) for group in row.split(grid.group_size)])
            for row in weight
        ]
    )


def test_the_weights_of_tokens_decide(rng):
    """The outlier's column is used by the first half of the tokens only."""
    inputs = torch.randn(64, 8, generator=rng)
    inputs[32:, 0] = 0
    weight = torch.cat([torch.full((1, 1), 4.0), 0.4 * torch.ones(1, 7)], 1)
    first, second = torch.zeros(64), torch.zeros(64)
    first[:32], second[32:] = 1, 1

    for_first = clip_weight(weight, moments(inputs, first), Grid(3)).weight
    for_second = clip_weight(weight, moments(inputs, second), Grid(3)).weight

    assert for_second[0, 0] < for_first[0, 0]


def test_the_scale_of_second_moments_does_not_matter(rng):
    inputs, token_weights = weighted_inputs(rng)
    weight = torch.randn(4, 8, generator=rng) ** 3
    hessian = moments(inputs, token_weights)

    first = clip_weight(weight, hessian, Grid(3, 4))
    second = clip_weight(weight, 4 * hessian, Grid(3, 4))

    assert torch.equal(first.weight, second.weight)


def test_without_tokens_nothing_is_clipped(rng):
    weight = torch.randn(4, 8, generator=rng)
    assert torch.equal(clip_weight(weight, torch.zeros(8, 8), Grid(3)).weight, weight)


def test_the_dtype_is_kept(rng):
    weight = (torch.randn(4, 8, generator=rng) ** 3).bfloat16()
    assert clip_weight(weight, torch.eye(8), Grid(3)).weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("hessian", "ratios", "message"),
    [
        (torch.eye(4), (1.0,), r"must be \[8, 8\], got \[4, 4\]"),
        (torch.eye(8), (0.0,), r"must lie in \(0, 1\], got \(0.0,\)"),
        (torch.eye(8), (1.5,), r"got \(1.5,\)"),
    ],
    ids=["shape", "zero", "more-than-one"],
)
def test_refuses(hessian, ratios, message):
    with pytest.raises(ValueError, match=message):
        clip_weight(torch.ones(2, 8), hessian, Grid(3), ratios=ratios)
