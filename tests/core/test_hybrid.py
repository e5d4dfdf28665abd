"""Who stays scalar: shares, thresholds, ties and groups."""

import random

import pytest

from moeq_plugin.core.hybrid import choose_scalar, choose_scalar_below
from moeq_plugin.core.uniformity import UniformityScore


def scores(num=20, seed=0):
    rng = random.Random(seed)
    return {
        f"w{i:02}": UniformityScore(rng.uniform(0, 5), 10 ** rng.uniform(0, 6), 1024)
        for i in range(num)
    }


@pytest.mark.parametrize("num", [1, 7, 20])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.35, 0.5, 0.9, 1.0])
def test_the_share_is_met_to_the_nearest_weight(num, fraction):
    chosen = choose_scalar(scores(num), scalar_frac=fraction)

    assert abs(len(chosen) - fraction * num) <= 0.5


@pytest.mark.parametrize("seed", range(5))
def test_the_share_of_elements_is_met_within_one_weight(seed):
    given = scores(seed=seed)
    rng = random.Random(seed)
    sizes = {name: rng.choice([1, 2, 4, 50]) for name in given}
    total = sum(sizes.values())

    for fraction in (0, 0.25, 0.5, 0.9, 1):
        chosen = sum(
            sizes[name] for name in choose_scalar(given, scalar_frac=fraction, sizes=sizes)
        )

        assert abs(chosen - fraction * total) <= max(sizes.values())
        assert fraction not in (0, 1) or chosen == fraction * total


@pytest.mark.parametrize("seed", range(5))
def test_rank_is_the_conjunction_of_two_percentiles(seed):
    """Thresholds at a common percentile of both proxies choose the same weights."""
    given = scores(seed=seed)
    coarse = sorted(s.p_coarse for s in given.values())
    fine = sorted(s.p_fine for s in given.values())

    for percentile in range(len(given)):
        by_threshold = choose_scalar_below(given, coarse[percentile], fine[percentile])
        share = len(by_threshold) / len(given)
        if share < 1:
            assert choose_scalar(given, scalar_frac=share) == by_threshold


@pytest.mark.parametrize("seed", range(3))
def test_more_never_takes_a_scalar_weight_away(seed):
    given = scores(seed=seed)
    steps = [i / 20 for i in range(21)]

    by_share = [choose_scalar(given, scalar_frac=s) for s in steps]
    by_coarse = [choose_scalar_below(given, 5 * s, 1e3) for s in steps]
    by_fine = [choose_scalar_below(given, 2.5, 1e6 * s) for s in steps]

    for chosen in (by_share, by_coarse, by_fine):
        assert all(a <= b for a, b in zip(chosen, chosen[1:], strict=False))


def test_a_rise_in_either_proxy_can_cost_a_weight_its_place():
    easy = UniformityScore(1.0, 1.0, 9)
    for hard in (UniformityScore(2.0, 1.0, 9), UniformityScore(1.0, 2.0, 9)):
        given = {"a": hard, "b": easy, "c": easy}

        assert choose_scalar(given, scalar_frac=2 / 3) == {"b", "c"}


def test_ties_and_order_do_not_matter():
    tied = {name: UniformityScore(1.0, 1.0, 9) for name in "badc"}

    chosen = choose_scalar(tied, scalar_frac=0.5)

    assert chosen == {"a", "b"}
    for order in ("dcba", "abcd"):
        assert choose_scalar({n: tied[n] for n in order}, scalar_frac=0.5) == chosen


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_a_group_decides_together(fraction):
    given = scores(12)
    groups = [["w00", "w05", "w11", "absent"], ["w02", "w03"]]

    for chosen in (
        choose_scalar(given, scalar_frac=fraction, groups=groups),
        choose_scalar_below(given, 5 * fraction, 1e6**fraction, groups=groups),
    ):
        for group in groups:
            assert len({name in chosen for name in group if name in given}) == 1


def test_a_group_takes_the_mean_rank_of_its_elements():
    given = {n: UniformityScore(float(i), float(i), 9) for i, n in enumerate("abcde")}
    groups = [["a", "e"]]

    small_e = choose_scalar(given, scalar_frac=0.4, sizes={**dict.fromkeys("abcd", 5), "e": 1},
                            groups=groups)  # fmt: skip
    large_e = choose_scalar(given, scalar_frac=0.4, sizes={**dict.fromkeys("bcde", 5), "a": 1},
                            groups=groups)  # fmt: skip

    assert "a" in small_e  # mean rank 4 / 6, before b's 1
    assert "a" not in large_e  # mean rank 20 / 6, after c's 2


def test_one_hard_member_makes_its_group_hard_by_threshold():
    given = {"a": UniformityScore(1, 1, 9), "b": UniformityScore(9, 1, 9)}

    assert choose_scalar_below(given, 2, 2) == {"a"}
    assert choose_scalar_below(given, 2, 2, groups=[["a", "b"]]) == set()


def test_both_thresholds_count_and_are_exclusive():
    given = {
        "both": UniformityScore(1.0, 10.0, 9),
        "coarse": UniformityScore(1.54, 10.0, 9),
        "fine": UniformityScore(1.0, 30.0, 9),
    }

    assert choose_scalar_below(given, 1.54, 30) == {"both"}


def test_degenerate_weights_always_stay_scalar():
    given = {**scores(4), "zeros": UniformityScore(0.0, 0.0, 99, degenerate=True)}

    assert choose_scalar(given, scalar_frac=0) == {"zeros"}
    assert choose_scalar_below(given, 0, 0) == {"zeros"}


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_refuses_a_share_out_of_range(fraction):
    with pytest.raises(ValueError, match=f"between 0 and 1, got {fraction}"):
        choose_scalar(scores(), scalar_frac=fraction)


def test_refuses_a_weight_in_two_groups():
    with pytest.raises(ValueError, match="more than one group: w01"):
        choose_scalar(scores(), groups=[["w00", "w01"], ["w01", "w02"]])
