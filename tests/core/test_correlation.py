import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeq_plugin.core.correlation import (
    accumulate_cross_terms,
    certificate,
    coactivation,
)


def quadratic_loss(Q, choice):
    return sum(float(Q[e, b, f, c]) for e, b in enumerate(choice) for f, c in enumerate(choice))


def random_terms(rng, experts, options, *, rank=None, common=0.0):
    """Return a positive semidefinite ``Q``; ``common`` mixes one error into all experts."""
    factor = torch.randn(experts, options, rank or experts * options, generator=rng)
    factor = (factor + common * torch.randn(rank or experts * options, generator=rng)).double()
    factor *= 4.0 ** -torch.arange(options)[:, None]
    return torch.einsum("ebk,fck->ebfc", factor, factor)


def choices_of(Q):
    return [np.array(c) for c in itertools.product(range(Q.shape[1]), repeat=Q.shape[0])]


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
@pytest.mark.parametrize("tokens", [0, 7], ids=lambda n: f"{n}-tokens")
def test_cross_terms_are_inner_products_of_errors_on_shared_tokens(tokens, chunk_size):
    rng = torch.Generator().manual_seed(0)
    experts, slots, options = 5, 2, 3
    errors = torch.randn(tokens, slots, options, 4, generator=rng)
    index = torch.rand(tokens, experts, generator=rng).argsort(1)[:, :slots]
    Q = torch.ones(experts, options, experts, options, dtype=torch.float64)

    accumulate_cross_terms(Q, errors, index, chunk_size=chunk_size)

    expected = torch.ones_like(Q)
    for t, i, j in itertools.product(range(tokens), range(slots), range(slots)):
        for b, c in itertools.product(range(options), repeat=2):
            product = sum(x * y for x, y in zip(errors[t, i, b], errors[t, j, c], strict=True))
            expected[index[t, i], b, index[t, j], c] += product
    torch.testing.assert_close(Q, expected, rtol=1e-6, atol=1e-6)  # the loop sums in float32


@pytest.mark.parametrize(
    ("errors", "index"),
    [
        (torch.zeros(2, 2, 4), torch.zeros(2, 2, dtype=torch.int64)),
        (torch.zeros(2, 2, 4, 5), torch.zeros(2, 2, dtype=torch.int64)),
        (torch.zeros(2, 2, 3, 5), torch.zeros(2, 1, dtype=torch.int64)),
    ],
    ids=["no-options", "wrong-options", "wrong-slots"],
)
def test_refuses_cross_terms_of_other_shapes(errors, index):
    with pytest.raises(ValueError, match=r"errors must be \[tokens, slots, 3, features\]"):
        accumulate_cross_terms(torch.zeros(4, 3, 4, 3), errors, index)


def test_coactivation_counts_tokens_that_reach_both():
    index = torch.tensor([[0, 1], [2, 0], [0, 1], [3, 2]])

    share = coactivation(index, 5)

    for e, f in itertools.product(range(5), repeat=2):
        assert share[e, f] == sum(e in row and f in row for row in index.tolist()) / 4
    assert coactivation(index[:0], 5).eq(0).all()


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 3), st.sampled_from([0.0, 0.3, 3]))
def test_certificate_holds_for_every_choice(seed, experts, options, common):
    rng = torch.Generator().manual_seed(seed)
    Q = random_terms(rng, experts, options, rank=64, common=common)
    Q[0] = Q[:, :, 0] = 0  # an expert without error

    found = certificate(Q)

    for choice in choices_of(Q):
        loss = quadratic_loss(Q, choice)
        diagonal = sum(float(Q[e, b, e, b]) for e, b in enumerate(choice))
        slack = 1e-9 * diagonal
        assert (2 - found.eigenvalue) * diagonal - slack <= loss
        assert loss <= found.eigenvalue * diagonal + slack
    assert found.correlation.diagonal().eq(1).all()
    assert found.correlation[0, 1:].eq(0).all()


def test_certificate_of_known_correlations():
    # two experts with one option, correlation -0.5: eigenvalue 1.5; losses 4 and 9
    Q = torch.tensor([[4.0, -3.0], [-3.0, 9.0]], dtype=torch.float64).view(2, 1, 2, 1)
    found = certificate(Q)
    assert found.eigenvalue == pytest.approx(1.5)
    assert found.factor == pytest.approx(3.0)
    assert found.correlation[0, 1] == pytest.approx(0.5)
    assert quadratic_loss(Q, np.array([0, 0])) == 7

    assert certificate(torch.ones(2, 1, 2, 1)).factor == math.inf  # the same error twice
    independent = certificate(torch.eye(3).view(3, 1, 3, 1))
    assert (independent.eigenvalue, independent.factor) == (1, 1)
