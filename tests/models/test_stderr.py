import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeq_plugin.models.stderr import mean_and_stderr, quantile_and_stderr

vectors = st.lists(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9), min_size=1, max_size=6
)


@given(vectors, st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_weighs_sequences_equally(lists, share):
    values = np.concatenate([np.array(x) for x in lists])
    weights = np.concatenate([np.full(len(x), 1 / len(x)) for x in lists])
    expected = np.quantile(values, share, weights=weights, method="inverted_cdf")

    found, _ = quantile_and_stderr([torch.tensor(x) for x in lists], share)

    # where the share is reached exactly, rounding decides in numpy: a neighbour is as right
    low, high = (
        np.quantile(values, min(max(share + d, 0), 1), weights=weights, method="inverted_cdf")
        for d in (-1e-6, 1e-6)
    )
    assert found == pytest.approx(expected) or low <= found <= high


def test_the_error_of_a_quantile_is_that_of_repeated_sampling():
    generator = torch.Generator().manual_seed(0)

    def sample():  # 64 sequences that differ in level, 50 tokens each
        levels = torch.randn(64, 1, generator=generator)
        return list(levels + torch.randn(64, 50, generator=generator))

    for share in (0.5, 0.9):
        found = [quantile_and_stderr(sample(), share) for _ in range(200)]
        spread = torch.tensor([quantile for quantile, _ in found]).std().item()
        claimed = sum(stderr for _, stderr in found) / len(found)
        assert claimed == pytest.approx(spread, rel=0.15)


def test_a_quantile_has_the_order_of_tokens_not_of_sequences():
    one, other = torch.tensor([5.0, 1.0, 3.0]), torch.tensor([2.0, 4.0, 9.0])
    assert quantile_and_stderr([one, other], 0.5) == quantile_and_stderr([other, one], 0.5)
    assert quantile_and_stderr([one, other], 1.0)[0] == 9


def test_one_sequence_has_no_error():
    assert math.isnan(mean_and_stderr(torch.tensor([1.0]))[1])
    assert math.isnan(quantile_and_stderr([torch.tensor([1.0, 2.0])], 0.5)[1])
