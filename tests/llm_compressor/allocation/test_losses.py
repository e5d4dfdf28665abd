"""A table of losses is whole, whatever was called while calibrating."""

import numpy as np
import pytest
import torch

pytest.importorskip("llmcompressor")

from moeq_plugin.integrations.llm_compressor.allocation.choices import Choices
from moeq_plugin.integrations.llm_compressor.allocation.losses import MeasuredLosses
from moeq_plugin.integrations.llm_compressor.allocation.options import parse_options

OPTIONS = ("W2A16_G16", "W8A16_G64", "W4A16_G32")


def choices(*columns):
    linears = [torch.nn.Linear(of, 8, bias=False, dtype=torch.bfloat16) for of in columns]
    names = {linear: f"a.{index}" for index, linear in enumerate(linears)}
    return Choices(names, tuple(parse_options(OPTIONS)), units={}, fixed_bytes=0)


def test_what_was_put_is_what_comes_out_and_what_does_not_fit_stays_impossible():
    of = choices(64, 64)
    losses = MeasuredLosses(of, num_domains=2)
    first, second = of.names
    losses.expect(of.names)
    losses.put(second, 0, [1.0, 2.0])
    losses.put(first, 2, 3.0)

    expected = np.full((2, 2, 3), np.inf)
    expected[:, 1, 0] = [1.0, 2.0]
    expected[:, 0, 2] = 3.0
    np.testing.assert_array_equal(losses.complete(), expected)
    assert losses.pending() == []


@pytest.mark.parametrize(("columns", "kept"), [(64, 1), (96, 2), (16, 0)])
def test_a_linear_that_was_never_called_keeps_the_largest_option_that_fits(columns, kept):
    of = choices(64, columns)
    losses = MeasuredLosses(of, num_domains=1)
    seen, _ = of.names
    losses.expect([seen])
    losses.put(seen, 0, 1.0)

    assert losses.pending() == ["a.1"]
    assert list(losses.complete()[0, 1]) == [
        0.0 if option == kept else np.inf for option in (0, 1, 2)
    ]


def test_linears_that_no_option_fits_are_refused_by_name():
    with pytest.raises(ValueError, match=r"of none of these 1 linears.*\n  - a.1 \(columns=24\)"):
        choices(64, 24).check_fit()
