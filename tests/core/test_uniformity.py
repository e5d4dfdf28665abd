"""The proxy against its formula, known constants and the transformations it must not notice."""

import math

import pytest
import torch

from moeq_plugin.core.uniformity import score_uniformity

MODES = ["all", "unique", "quantile"]
GAMMA = 0.5772156649015329


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def by_the_paper(weight, order=4):
    """Return ``(P_c, P_f)`` in the paper's own notation, one gap after the other."""
    values = sorted(weight.flatten().tolist())
    gaps = [b - a for a, b in zip(values, values[1:], strict=False)]
    n, total = len(gaps), sum(gaps)
    shares = [gap / total for gap in gaps]
    coarse = math.log(n) + sum(g * math.log(g) for g in shares if g > 0)
    fine = 0.0
    for k in range(2, order + 1):
        moment = sum((g - 1 / n) ** k for g in shares) / n
        fine += n**k / (k * (k - 1)) * abs(moment)
    return coarse, fine


@pytest.mark.parametrize("gaps", MODES)
@pytest.mark.parametrize("weight", [torch.arange(100.0), torch.arange(60.0).view(5, 12) * -3 + 7])
def test_equally_spaced_values_score_zero(weight, gaps):
    score = score_uniformity(weight, gaps)

    assert (score.p_coarse, score.p_fine) == (0.0, 0.0)


@pytest.mark.parametrize("gaps", MODES)
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(8, 8), torch.full((3, 3), -1.5), torch.tensor([1.0, 2.0]), torch.empty(0)],
    ids=["zeros", "constant", "one-gap", "empty"],
)
def test_what_has_no_two_gaps_is_degenerate(weight, gaps):
    score = score_uniformity(weight, gaps)

    assert (score.p_coarse, score.p_fine, score.degenerate) == (0.0, 0.0, True)


@pytest.mark.parametrize("order", [2, 3, 4, 6])
def test_equals_the_paper_s_form(order):
    weight = normal(7, 9)

    score = score_uniformity(weight, "all", order=order)

    coarse, fine = by_the_paper(weight, order)
    assert score.p_coarse == pytest.approx(coarse, rel=1e-9)
    assert score.p_fine == pytest.approx(fine, rel=1e-9)
    assert score.num_gaps == 62


def test_iid_uniform_values_give_one_minus_euler_s_constant_and_nineteen_twelfths():
    weight = torch.rand(500_000, generator=generator(), dtype=torch.float64)

    score = score_uniformity(weight, "all")

    assert score.p_coarse == pytest.approx(1 - GAMMA, abs=0.01)
    assert score.p_fine == pytest.approx(19 / 12, abs=0.1)


def test_one_outlier_behind_a_hundred_equal_steps():
    weight = torch.cat([torch.arange(100.0), torch.tensor([10000.0])])

    score = score_uniformity(weight, "all")

    assert score.p_coarse == pytest.approx(4.5041, abs=1e-4)
    assert score.p_fine == pytest.approx(7.851e4, rel=1e-3)


@pytest.mark.parametrize("n", [5, 100])
def test_all_of_the_range_in_one_gap_is_the_upper_bound(n):
    weight = torch.cat([torch.zeros(n // 2), torch.ones(n + 1 - n // 2)])

    score = score_uniformity(weight, "all")

    assert score.p_coarse == pytest.approx(math.log(n), rel=1e-12)
    fine = (n - 1) / 2 + (n - 1) * (n - 2) / 6 + (n - 1) * (n * n - 3 * n + 3) / 12
    assert score.p_fine == pytest.approx(fine, rel=1e-9)


@pytest.mark.parametrize("gaps", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_stays_within_its_bounds(gaps, seed):
    score = score_uniformity(normal(40, 50, seed=seed) ** 3, gaps)

    assert 0 <= score.p_coarse <= math.log(score.num_gaps)
    assert math.isfinite(score.p_fine)


@pytest.mark.parametrize("gaps", MODES)
@pytest.mark.parametrize("factor", [2.0, -2.0, -0.25], ids=["doubled", "negated", "shrunk"])
def test_is_invariant_under_affine_maps(gaps, factor):
    # multiples of 1/1024 and a power of two: the map is exact, so are the gaps
    weight = (normal(30, 40) * 1024).round() / 1024
    expected = score_uniformity(weight, gaps)

    score = score_uniformity(weight * factor + 3, gaps)

    assert score.p_coarse == pytest.approx(expected.p_coarse, rel=1e-9)
    assert score.p_fine == pytest.approx(expected.p_fine, rel=1e-9)
    assert score.num_gaps == expected.num_gaps


@pytest.mark.parametrize("gaps", MODES)
def test_order_and_shape_of_the_elements_do_not_matter(gaps):
    weight = normal(30, 40)
    shuffled = weight.flatten()[torch.randperm(1200, generator=generator())]

    assert score_uniformity(shuffled.view(8, 150), gaps) == score_uniformity(weight, gaps)
    assert score_uniformity(weight.T, gaps) == score_uniformity(weight, gaps)


@pytest.mark.parametrize("gaps", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_wider_float_format_changes_nothing(gaps, dtype):
    weight = normal(30, 40).to(dtype)

    assert score_uniformity(weight, gaps) == score_uniformity(weight.double(), gaps)


def test_quantiles_hardly_notice_a_narrower_float_format():
    weight = normal(512, 512)

    full, half = (score_uniformity(w) for w in (weight, weight.half()))

    assert half.p_coarse == pytest.approx(full.p_coarse, rel=1e-2)
    assert half.p_fine == pytest.approx(full.p_fine, rel=1e-2)


def test_the_fine_proxy_reacts_to_an_outlier_by_orders_of_magnitude():
    weight = torch.rand(768 * 768, generator=generator(), dtype=torch.float64)
    with_outlier = torch.cat([weight, torch.tensor([1.2])])

    before, after = (score_uniformity(w, "all") for w in (weight, with_outlier))

    assert before.p_coarse < after.p_coarse < before.p_coarse + 2
    assert after.p_fine > 1e9 * before.p_fine


def test_moving_the_largest_value_out_never_lowers_the_coarse_proxy():
    weight = normal(200)
    ends = weight.max() + torch.logspace(-1, 3, 20, dtype=torch.float64)

    scores = [score_uniformity(torch.cat([weight, end[None]]), "all").p_coarse for end in ends]

    assert scores == sorted(scores)


def test_signed_terms_add_up_to_the_coarse_proxy_while_no_gap_is_twice_the_mean():
    gaps = torch.rand(400, generator=generator(), dtype=torch.float64) * 0.6 + 0.7
    deviation = gaps / gaps.mean() - 1
    weight = torch.cat([torch.zeros(1, dtype=torch.float64), gaps.cumsum(0)])

    score = score_uniformity(weight, "all")

    terms = [(-1) ** k * (deviation**k).mean().item() / (k * (k - 1)) for k in range(2, 41)]
    assert sum(terms) == pytest.approx(score.p_coarse, rel=1e-9)
    assert score.p_fine >= terms[0]


def test_more_moments_never_lower_the_fine_proxy():
    fine = [score_uniformity(normal(20, 30), "all", order=k).p_fine for k in (2, 3, 4)]

    assert fine == sorted(fine)


@pytest.mark.parametrize("seed", range(3))
def test_heavier_tails_score_higher(seed):
    g = generator(seed)
    size = (256, 256)
    uniform = torch.rand(size, generator=g)
    normal_ = torch.randn(size, generator=g)
    laplace = normal_.sign() * -torch.rand(size, generator=g).log()
    t4 = normal_ / torch.randn(4, *size, generator=g).square().mean(0).sqrt()

    scores = [score_uniformity(w) for w in (uniform, normal_, laplace, t4)]

    assert [s.p_coarse for s in scores] == sorted(s.p_coarse for s in scores)
    assert [s.p_fine for s in scores] == sorted(s.p_fine for s in scores)


def test_unique_gaps_count_once():
    weight = torch.tensor([0.0, 1, 2, 3, 5, 7, 7, 15])  # gaps 1 1 1 2 2 0 8

    score = score_uniformity(weight, "unique")

    shares = [1 / 11, 2 / 11, 8 / 11]
    expected = math.log(3) + sum(g * math.log(g) for g in shares)
    assert score.num_gaps == 3
    assert score.p_coarse == pytest.approx(expected, rel=1e-12)


def test_quantiles_interpolate_between_neighbours():
    weight = torch.tensor([0.0, 1, 3, 7, 15, 31])  # 5 gaps, 2 bins: median 5

    score = score_uniformity(weight, "quantile", bins=2)

    shares = [5 / 31, 26 / 31]
    assert score.num_gaps == 2
    expected = math.log(2) + sum(g * math.log(g) for g in shares)
    assert score.p_coarse == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("gaps", MODES)
@pytest.mark.parametrize(
    "weight",
    [
        normal(60, 70),
        normal(60, 70).bfloat16(),
        (normal(60, 70) ** 5).float(),
        normal(4200).round(),
    ],
    ids=["normal", "ties", "outliers", "few-values"],
)
def test_sorting_in_runs_changes_nothing(weight, gaps):
    expected = score_uniformity(weight, gaps)

    score = score_uniformity(weight, gaps, max_run=700)

    assert score.num_gaps == expected.num_gaps
    assert score.p_coarse == pytest.approx(expected.p_coarse, rel=1e-9)
    assert score.p_fine == pytest.approx(expected.p_fine, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gaps": "some"}, "gaps must be one of .*'all'.*got 'some'"),
        ({"bins": 1}, "must be at least 2, got 1, 4 and"),
        ({"order": 1}, "must be at least 2, got 1024, 1 and"),
        ({"max_run": 1}, "must be at least 2, got 1024, 4 and 1"),
    ],
    ids=["gaps", "bins", "order", "max_run"],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        score_uniformity(torch.rand(4, 4), **arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refuses_what_is_not_finite(value):
    weight = torch.rand(4, 4)
    weight[2, 1] = value

    with pytest.raises(ValueError, match="NaN or infinity"):
        score_uniformity(weight)
