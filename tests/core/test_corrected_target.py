"""The corrected target is the ridge least-squares solution, by brute force in float64."""

import pytest
import torch

from moeq_plugin.core.corrected_target import PairedMoments, corrected
from moeq_plugin.core.hessian import SecondMoments, own_share, shrink_toward

TOKENS, INPUTS, OUTPUTS = 40, 12, 7


def problem(tokens=TOKENS, seed=0, *, dtype=torch.float64):
    """Inputs of both streams, what the residual streams differ by, weights of tokens, a weight."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(INPUTS, INPUTS, generator=generator)  # correlated, as real inputs are
    ours = torch.randn(tokens, INPUTS, generator=generator) @ shared
    theirs = ours + 0.3 * torch.randn(tokens, INPUTS, generator=generator)
    residual = 0.2 * torch.randn(tokens, OUTPUTS, generator=generator)
    a = torch.rand(tokens, generator=generator) + 0.1
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator)
    return [tensor.to(dtype) for tensor in (ours, theirs, residual, a, weight)]


def moments_of(ours, theirs, residual, a, parts=1):
    channels = 0 if residual is None else OUTPUTS
    moments = PairedMoments.none(INPUTS, channels)
    for field in ("hessian", "cross", "residual"):
        setattr(moments, field, getattr(moments, field).to(ours.dtype))
    for rows in torch.arange(len(ours)).chunk(parts):
        moments.add(ours[rows], a[rows])
        of_residual = residual[rows] if residual is not None else None
        moments.add_pairs(ours[rows], theirs[rows] - ours[rows], of_residual, a[rows])
    return moments


def loss(weight, ours, target, a):
    return (a * (target - ours @ weight.T).square().sum(1)).sum().item()


@pytest.mark.parametrize("writes", [False, True], ids=["reads", "writes to the residual stream"])
def test_it_is_the_least_squares_solution_with_a_ridge(writes):
    """Stacked: the rows of the tokens, and those of the ridge that ask for no change."""
    ours, theirs, residual, a, weight = problem()
    target = theirs @ weight.T + (residual if writes else 0)
    moments = moments_of(ours, theirs, residual if writes else None, a)
    found = corrected(weight, moments.hessian, moments)

    # H is twice the sum over tokens, so that half of the ridge is on each squared change
    ridge = 0.05 * moments.hessian.diagonal().mean() / 2
    rows = torch.cat([a.sqrt()[:, None] * ours, ridge.sqrt() * torch.eye(INPUTS).double()])
    wanted = torch.cat([a.sqrt()[:, None] * target, ridge.sqrt() * weight.T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_equal_streams_leave_the_weight_as_it_is_bit_by_bit():
    ours, _, residual, a, weight = problem(dtype=torch.float32)
    moments = moments_of(ours, ours, torch.zeros_like(residual), a)
    assert torch.equal(corrected(weight, moments.hessian, moments), weight)


@pytest.mark.parametrize("tokens", [1, 3, 11, 12, 40])
@pytest.mark.parametrize("seed", range(5))
def test_the_loss_on_the_observed_tokens_never_rises(tokens, seed):
    """However few they are, and whatever is mixed in for those that are missing."""
    ours, theirs, residual, a, weight = problem(tokens, seed)
    target = theirs @ weight.T + residual
    moments = moments_of(ours, theirs, residual, a)
    before = loss(weight, ours, target, a)
    assert loss(corrected(weight, moments.hessian, moments), ours, target, a) < before

    layer = SecondMoments.zeros(INPUTS)
    layer.hessian = layer.hessian.double()
    layer.add(problem(200, seed + 100)[0])
    mixed = shrink_toward(moments, layer, min_effective_tokens=INPUTS)
    share = own_share(moments, min_effective_tokens=INPUTS) / moments.weight_sum.item()
    assert loss(corrected(weight, mixed, moments, share), ours, target, a) < before


def test_an_expert_with_few_tokens_changes_little():
    """One token of 64 that are needed: the rest of the inputs is guarded by those of the layer."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, 64, generator=generator)
    layer = SecondMoments.zeros(64)
    layer.add(torch.randn(500, 64, generator=generator))
    changes = []
    for tokens in (1, 8, 64, 512):
        ours = torch.randn(tokens, 64, generator=generator)
        moments = PairedMoments.none(64, 0)
        moments.add(ours)
        moments.add_pairs(ours, 0.5 * torch.randn(tokens, 64, generator=generator), None, None)
        needed = {"min_effective_tokens": 64.0}
        hessian = shrink_toward(moments, layer, **needed)
        share = own_share(moments, **needed) / moments.weight_sum.item()
        changes.append((corrected(weight, hessian, moments, share) - weight).norm() / weight.norm())
    alone = corrected(weight, moments.hessian, moments)
    assert changes[0] < 0.1
    assert changes[0] < changes[1] < changes[2]
    assert alone.isfinite().all()


def test_what_is_mixed_in_is_the_moments_own_share():
    """The mixture holds the expert's own second moments times this share, and the layer's."""
    ours, theirs, residual, a, _ = problem(5)
    moments = moments_of(ours, theirs, residual, a)
    layer = SecondMoments.zeros(INPUTS)
    layer.hessian = layer.hessian.double()
    layer.add(problem(200, 1)[0])
    needed = {"min_effective_tokens": 9.0, "shrinkage": 2.0}
    share = own_share(moments, **needed)
    expected = share * moments.mean() + (1 - share) * layer.mean()
    torch.testing.assert_close(shrink_toward(moments, layer, **needed), expected)
    n = moments.effective_tokens
    assert share == pytest.approx(n / (n + 2 * (9 - n)))


def test_sums_can_be_split_over_batches():
    parts = problem()
    whole, split = (moments_of(*parts[:4], parts=n) for n in (1, 3))
    for name, tensor in vars(whole).items():
        torch.testing.assert_close(vars(split)[name], tensor)


def test_no_token_means_no_change():
    weight = torch.randn(OUTPUTS, INPUTS)
    nothing = PairedMoments.none(INPUTS, OUTPUTS)
    assert torch.equal(corrected(weight, nothing.hessian, nothing), weight)
    assert torch.equal(corrected(weight, torch.eye(INPUTS), nothing, share=0.0), weight)
