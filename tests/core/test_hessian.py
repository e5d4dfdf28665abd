import pytest
import torch

from moeq_plugin.core.hessian import (
    SecondMoments,
    accumulate_hessian,
    shrink_toward,
    with_white_noise,
)


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def outer_products(inputs, weights):
    hessian = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    for x, a in zip(inputs.double(), weights.double(), strict=True):
        hessian += 2 * a * torch.outer(x, x)
    return hessian


@pytest.mark.parametrize("tokens", [0, 1, 7], ids=lambda n: f"{n}-tokens")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_matches_the_sum_of_outer_products(tokens, dtype, rng):
    inputs = torch.randn(tokens, 5, generator=rng).to(dtype)
    weights = torch.rand(tokens, generator=rng)
    hessian = torch.zeros(5, 5, dtype=torch.float64)

    accumulate_hessian(hessian, inputs, weights)

    torch.testing.assert_close(hessian, outer_products(inputs, weights))


def test_without_weights_every_token_counts_once(rng):
    inputs = torch.randn(6, 4, generator=rng)
    plain, ones = SecondMoments.zeros(4), SecondMoments.zeros(4)

    plain.add(inputs)
    ones.add(inputs, torch.ones(6))

    torch.testing.assert_close(plain.hessian, ones.hessian)
    assert plain.effective_tokens == ones.effective_tokens == 6


def test_splitting_the_batch_changes_nothing(rng):
    inputs, weights = torch.randn(12, 4, generator=rng), torch.rand(12, generator=rng)
    whole, parts = SecondMoments.zeros(4), SecondMoments.zeros(4)

    whole.add(inputs, weights)
    for x, a in zip(inputs.split(5), weights.split(5), strict=True):
        parts.add(x, a)

    torch.testing.assert_close(whole.hessian, parts.hessian)
    torch.testing.assert_close(whole.weight_sum, parts.weight_sum)
    torch.testing.assert_close(whole.weight_square_sum, parts.weight_square_sum)


def test_a_token_of_weight_zero_is_as_good_as_absent(rng):
    inputs = torch.randn(3, 4, generator=rng)
    with_zero, without = SecondMoments.zeros(4), SecondMoments.zeros(4)

    with_zero.add(inputs, torch.tensor([0.5, 0.0, 2.0]))
    without.add(inputs[[0, 2]], torch.tensor([0.5, 2.0]))

    assert torch.equal(with_zero.hessian, without.hessian)
    assert with_zero.effective_tokens == without.effective_tokens


def test_an_integer_weight_is_that_many_copies(rng):
    inputs = torch.randn(2, 3, generator=rng)
    weighted, copied = SecondMoments.zeros(3), SecondMoments.zeros(3)

    weighted.add(inputs, torch.tensor([3.0, 1.0]))
    copied.add(inputs[[0, 0, 0, 1]])

    torch.testing.assert_close(weighted.hessian, copied.hessian)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1.0] * 8, 8.0), ([1e-8] * 8, 8.0), ([1.0] + [0.0] * 7, 1.0), ([3.0, 1.0], 1.6)],
    ids=["equal", "equal-and-tiny", "one-token", "uneven"],
)
def test_effective_tokens(weights, expected):
    moments = SecondMoments.zeros(1)
    moments.add(torch.ones(len(weights), 1), torch.tensor(weights))
    assert moments.effective_tokens == pytest.approx(expected)


def test_nothing_seen_is_zero_and_not_nan():
    moments = SecondMoments.zeros(3)
    assert moments.effective_tokens == 0
    assert torch.equal(moments.mean(), torch.zeros(3, 3))


@pytest.mark.parametrize(
    ("inputs", "token_weights", "message"),
    [
        (torch.zeros(2, 3, 3), None, r"got \[2, 3, 3\]; flatten batch and sequence first"),
        (torch.zeros(2, 4), None, r"must be \[tokens, 3\]"),
        (torch.zeros(2, 3), torch.ones(3), r"token_weights must be \[2\], got \[3\]"),
        (torch.zeros(2, 3), torch.tensor([1.0, -0.5]), "got a minimum of -0.5"),
    ],
    ids=["not-flattened", "wrong-width", "wrong-length", "negative"],
)
def test_refuses(inputs, token_weights, message):
    with pytest.raises(ValueError, match=message):
        accumulate_hessian(torch.zeros(3, 3), inputs, token_weights)


class TestShrinkage:
    @pytest.fixture
    def expert_and_layer(self, rng):
        expert, layer = SecondMoments.zeros(3), SecondMoments.zeros(3)
        expert.add(torch.randn(4, 3, generator=rng))
        layer.add(torch.randn(100, 3, generator=rng))
        return expert, layer

    def test_mixes_in_as_many_layer_tokens_as_are_missing(self, expert_and_layer):
        expert, layer = expert_and_layer

        mixed = shrink_toward(expert, layer, min_effective_tokens=16)

        missing = 16 - 4
        copies = (expert.hessian + missing * layer.hessian / 100) / 16
        torch.testing.assert_close(mixed, copies)

    @pytest.mark.parametrize("threshold", [0, 3, 4], ids=lambda n: f"threshold-{n}")
    def test_leaves_an_expert_alone_that_saw_enough(self, expert_and_layer, threshold):
        expert, layer = expert_and_layer
        mixed = shrink_toward(expert, layer, min_effective_tokens=threshold)
        torch.testing.assert_close(mixed, expert.mean())

    def test_is_continuous_at_the_threshold(self, expert_and_layer):
        expert, layer = expert_and_layer
        just_below = shrink_toward(expert, layer, min_effective_tokens=4 + 1e-6)
        torch.testing.assert_close(just_below, expert.mean())

    def test_zero_shrinkage_borrows_only_when_there_is_nothing(self, expert_and_layer):
        expert, layer = expert_and_layer
        kept = shrink_toward(expert, layer, min_effective_tokens=99, shrinkage=0)
        borrowed = shrink_toward(
            SecondMoments.zeros(3), layer, min_effective_tokens=99, shrinkage=0
        )
        torch.testing.assert_close(kept, expert.mean())
        torch.testing.assert_close(borrowed, layer.mean())


def test_peaks_are_weighted_like_the_second_moments():
    inputs = torch.tensor([[1.0, -3.0], [2.0, 0.5], [0.0, 0.0]])
    weighted, plain = SecondMoments.zeros(2), SecondMoments.zeros(2)

    weighted.add(inputs, torch.tensor([0.5, 2.0, 7.0]))
    plain.add(inputs)

    assert weighted.peak_square_sum.item() == 0.5 * 9 + 2 * 4
    assert plain.peak_square_sum.item() == 9 + 4


def test_white_noise_adds_the_same_power_to_all_inputs_and_nothing_between_them(rng):
    moments = SecondMoments.zeros(3)
    moments.add(torch.randn(20, 3, generator=rng))
    before = moments.hessian.clone()

    noisy = with_white_noise(moments.hessian, 0.5)

    torch.testing.assert_close(noisy, before + 0.5 * before.trace() / 3 * torch.eye(3))
    assert torch.equal(moments.hessian, before)
    assert with_white_noise(before, 0.0) is before
