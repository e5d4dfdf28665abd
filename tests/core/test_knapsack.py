import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeq_plugin.core.knapsack import choose_options


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


@settings(derandomize=True, max_examples=400, deadline=None)
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
