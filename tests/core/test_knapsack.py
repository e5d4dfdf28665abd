import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, sparse

from moeq_plugin.core.knapsack import choose_options
from moeq_plugin.core.minimax_knapsack import minimize_worst_ratio


def instance(seed, groups, options, *, whole_losses, forbidden=0.15):
    """Return losses, sizes and a limit; sizes with and without a common divisor, zeros, ties."""
    rng = np.random.default_rng(seed)
    shape = (groups, options)
    loss = rng.integers(0, 6, shape) if whole_losses else 10.0 ** rng.uniform(-6, 3, shape)
    loss = loss.astype(np.float64)
    num_bytes = rng.integers(0, 30, shape) * rng.choice([1, 7])
    loss[rng.random(shape) < forbidden] = np.inf
    never = ~np.isfinite(loss).any(1)
    loss[never, rng.integers(options)] = 1.0
    smallest = np.where(np.isfinite(loss), num_bytes, 10**9).min(1).sum()
    return loss, num_bytes, int(rng.integers(smallest, num_bytes.max(1).sum() + 2))


def every_choice(loss):
    return itertools.product(*[np.flatnonzero(np.isfinite(row)).tolist() for row in loss])


def brute_force(loss, num_bytes, limit):
    """Return the least loss and, among its choices, the fewest bytes."""
    groups = range(len(loss))
    sums = (
        (sum(loss[g, o] for g, o in zip(groups, c, strict=True)),
         sum(int(num_bytes[g, o]) for g, o in zip(groups, c, strict=True)))
        for c in every_choice(loss)
    )  # fmt: skip
    return min(pair for pair in sums if pair[1] <= limit)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_equals_brute_force(seed, groups, options, whole_losses):
    loss, num_bytes, limit = instance(seed, groups, options, whole_losses=whole_losses)

    solution = choose_options(loss, num_bytes, limit)

    value, size = brute_force(loss, num_bytes, limit)
    chosen = np.arange(groups), solution.choice
    assert solution.value == pytest.approx(value, rel=1e-12, abs=0)
    assert solution.value == pytest.approx(loss[chosen].sum(), rel=1e-12, abs=0)
    assert solution.num_bytes == num_bytes[chosen].sum() <= limit
    assert solution.bound == solution.value
    if whole_losses:  # sums are exact, so ties are ties
        assert solution.num_bytes == size


def model(kind, seed):
    """Return a larger instance that looks like a model's, with values around 1e6."""
    rng = np.random.default_rng(seed)
    groups, options = int(20 * 15 ** rng.uniform(0, 1)), int(rng.integers(3, 7))
    bits = np.array([2, 3, 4, 5, 6, 8])[:options]
    weights = {
        "one shape": np.full(groups, 2048 * 768),
        "few shapes": rng.choice([2048 * 768, 2048 * 1536, 4096 * 512, 2048 * 11008], groups),
        "any size": rng.integers(10**5, 10**7, groups),
    }[kind]
    num_bytes = (weights[:, None] * (bits + 0.125) / 8).astype(np.int64)
    if kind == "any size":
        num_bytes += rng.integers(0, 1000, num_bytes.shape)
    loss = np.exp(rng.normal(0, 2.5, (groups, 1))) * weights[:, None] * 4.0**-bits
    loss *= np.exp(rng.normal(0, 0.2, loss.shape))
    share = rng.uniform(0.05, 0.95)
    limit = int(num_bytes.min(1).sum() * (1 - share) + num_bytes.max(1).sum() * share)
    return loss, num_bytes, limit


def solve_with_highs(loss, num_bytes, limit):
    """Return an independent solver's choice."""
    groups, options = loss.shape
    scale = loss.min(1).sum() / 1e6  # its absolute tolerance of 1e-6 must mean nothing
    one_each = sparse.kron(sparse.eye_array(groups), np.ones((1, options)))
    result = optimize.milp(
        loss.ravel() / scale,
        integrality=np.ones(loss.size),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each.tocsc(), 1, 1),
            optimize.LinearConstraint(num_bytes.reshape(1, -1) / limit * groups, ub=groups),
        ],
        options={"mip_rel_gap": 0},
    )
    return result.x.reshape(loss.shape).argmax(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one shape", "few shapes", "any size"])
@pytest.mark.parametrize("seed", range(67))
def test_equals_highs(kind, seed):
    loss, num_bytes, limit = model(kind, seed)

    solution = choose_options(loss, num_bytes, limit)

    groups = np.arange(len(loss))
    theirs = groups, solve_with_highs(loss, num_bytes, limit)
    assert solution.bound == solution.value
    assert solution.num_bytes <= limit
    assert num_bytes[theirs].sum() <= limit * (1 + 1e-6)  # its feasibility tolerance
    assert solution.value == pytest.approx(loss[theirs].sum(), rel=1e-6)
    if num_bytes[theirs].sum() <= limit:
        assert solution.value <= loss[theirs].sum() * (1 + 1e-12)


def medium(seed):
    """Return 5 to 40 groups whose losses nearly or exactly follow their sizes: hard to close."""
    rng = np.random.default_rng(seed)
    shape = int(rng.integers(5, 41)), int(rng.integers(2, 5))
    num_bytes = rng.integers(0, 60, shape)
    scatter = rng.choice([0.0, 0.01, 0.1, 1.0])
    loss = (60 - num_bytes) * np.exp(scatter * rng.normal(0, 1, shape))
    loss[rng.random(shape) < 0.1] = np.inf
    loss[~np.isfinite(loss).any(1), 0] = 60.0
    low = np.where(np.isfinite(loss), num_bytes, 60).min(1).sum()
    return loss, num_bytes, int(rng.integers(low, num_bytes.max(1).sum() + 1))


def dynamic_programming(loss, num_bytes, limit):
    """Return the least loss, from the best one for every number of bytes up to the limit."""
    best = np.zeros(limit + 1)
    for losses, sizes in zip(loss, num_bytes, strict=True):
        with_option = np.full((len(losses), limit + 1), np.inf)
        for row, x, size in zip(with_option, losses, sizes, strict=True):
            row[size:] = best[: max(limit + 1 - size, 0)] + x
        best = with_option.min(0)
    return best[-1]


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.integers(0, 2**31))
def test_equals_dynamic_programming(seed):
    loss, num_bytes, limit = medium(seed)

    solution = choose_options(loss, num_bytes, limit)

    assert solution.num_bytes <= limit
    assert solution.value == pytest.approx(dynamic_programming(loss, num_bytes, limit), rel=1e-11)
    assert solution.bound == solution.value


@pytest.mark.parametrize("states", [1, 3, 10, 30])
def test_a_search_that_runs_out_of_space_still_bounds_the_optimum(states):
    missed = 0
    for seed in range(60):
        loss, num_bytes, limit = medium(seed)

        solution = choose_options(loss, num_bytes, limit, max_states=states)

        optimum = dynamic_programming(loss, num_bytes, limit)
        assert solution.num_bytes <= limit
        assert solution.bound <= optimum * (1 + 1e-11)
        assert optimum <= solution.value * (1 + 1e-11)
        missed += solution.value > optimum * (1 + 1e-9)
    assert missed or states == 30  # the space was too small for some


def test_a_search_that_runs_out_of_space_says_so():
    # one rate for all bytes, sizes without a pattern: subset sum, the hardest instance there is
    rng = np.random.default_rng(0)
    num_bytes = np.stack([np.zeros(60, dtype=np.int64), rng.integers(10**8, 10**9, 60)], axis=1)
    loss = (num_bytes[:, 1:] - num_bytes) * 1e-9

    solution = choose_options(loss, num_bytes, int(num_bytes.sum() // 2), max_states=20)

    assert 0 < solution.value - solution.bound < 0.1 * solution.value


def test_losses_of_very_different_size_are_not_lost_in_rounding():
    # the first group must have its second option, and then two bytes are left for the others
    loss = np.array([[1e9, 1e-9], [5e-9, 1e-9], [4e-9, 1e-9], [3e-9, 1e-9]])
    solution = choose_options(loss, np.array([[0, 5], [0, 1], [0, 1], [0, 1]]), 7)
    assert solution.choice.tolist() == [1, 1, 1, 0]
    assert solution.value == pytest.approx(6e-9, rel=1e-12)


def test_ties_go_to_the_smaller_choice_and_then_to_the_first_option():
    loss = np.array([[5.0, 1.0, 1.0, 1.0]])
    assert choose_options(loss, np.array([[0, 3, 2, 2]]), 9).choice.tolist() == [2]
    assert choose_options(loss, np.array([[0, 3, 2, 2]]), 2).choice.tolist() == [2]


def test_ten_thousand_groups_are_solved_exactly():
    loss, num_bytes, limit = model("any size", 0)
    solution = choose_options(np.tile(loss, (100, 1)), np.tile(num_bytes, (100, 1)), 100 * limit)
    assert len(solution.choice) > 10_000
    assert solution.bound == solution.value
    # a hundred copies can do no worse than a hundred times the best of one
    assert solution.value <= 100 * choose_options(loss, num_bytes, limit).value


@pytest.mark.parametrize("solve", [choose_options, minimize_worst_ratio], ids=["mean", "worst"])
@pytest.mark.parametrize(
    ("loss", "limit", "message"),
    [
        ([[1.0, 2.0], [np.inf, np.inf]], 9, r"groups \[1\] have no option"),
        ([[1.0, 2.0], [1.0, np.inf]], 5, "the smallest options take 6 bytes, more than 5"),
    ],
    ids=["no-option", "over-limit"],
)
def test_refuses(solve, loss, limit, message):
    loss = np.array(loss)
    with pytest.raises(ValueError, match=message):
        solve(loss if solve is choose_options else loss[None], np.array([[3, 5], [3, 2]]), limit)


@settings(derandomize=True, max_examples=120, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4))
def test_worst_ratio_equals_brute_force(seed, domains, groups, options):
    loss, num_bytes, limit = instance(seed, groups, options, whole_losses=bool(seed % 2))
    num_bytes = num_bytes * 123_457  # beyond what HiGHS's tolerances see
    rng = np.random.default_rng(seed)
    ratio = loss * 10.0 ** rng.uniform(-2, 0, (domains, *loss.shape))
    ratio[-1, rng.random(loss.shape) < 0.1] = np.inf
    ratio[:, :, 0] = np.where(np.isfinite(ratio[-1]).any(1), ratio[:, :, 0], 1.0)
    allowed = np.where(np.isfinite(ratio).all(0), 0.0, np.inf)
    limit = max(limit * 123_457, np.where(allowed == 0, num_bytes, 10**18).min(1).sum())

    solution = minimize_worst_ratio(ratio, num_bytes, limit)

    best = min(
        max(sum(r[g, o] for g, o in enumerate(c)) for r in ratio)
        for c in every_choice(allowed)
        if sum(int(num_bytes[g, o]) for g, o in enumerate(c)) <= limit
    )
    chosen = np.arange(groups), solution.choice
    assert solution.num_bytes == num_bytes[chosen].sum() <= limit
    assert solution.value == pytest.approx(max(r[chosen].sum() for r in ratio), rel=1e-12)
    assert solution.value == pytest.approx(best, rel=1e-6)
    assert solution.bound <= best * (1 + 1e-6)


def test_worst_ratio_of_many_groups_has_a_small_gap_without_highs():
    loss, num_bytes, limit = model("few shapes", 1)
    loss, num_bytes, limit = np.tile(loss, (8, 1)), np.tile(num_bytes, (8, 1)), 8 * limit
    assert len(loss) > 400
    ratio = loss * np.exp(np.random.default_rng(0).normal(0, 0.7, (4, len(loss), 1)))
    ratio /= ratio[:, :, :1].sum(1, keepdims=True)

    solution = minimize_worst_ratio(ratio, num_bytes, limit)

    assert solution.num_bytes <= limit
    assert solution.bound * (1 - 1e-12) <= solution.value <= solution.bound * 1.002


def test_a_search_that_stops_for_its_work_alone_still_bounds_the_optimum():
    # 300 pairs of bytes at one rate never fill an odd limit; the odd byte, worth less, is opened
    # last, after 300 steps of up to 300 partial choices each
    loss = np.array([[2.0, 0.0]] * 300 + [[0.5, 0.0]])
    num_bytes = np.array([[0, 2]] * 300 + [[0, 1]])

    hurried = choose_options(loss, num_bytes, 301, max_states=301)

    assert hurried.value == 300.5
    assert hurried.bound <= 300
    assert choose_options(loss, num_bytes, 301).value == 300


def test_the_price_is_per_byte():
    assert choose_options(np.array([[6.0, 1.0]]), np.array([[7, 17]]), 16).price == 0.5
