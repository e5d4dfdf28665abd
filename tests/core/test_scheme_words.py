from itertools import product

import pytest

from moeq_plugin.checkpoint.presets import scheme_named
from moeq_plugin.core.scheme_words import scheme_in_words

LAYOUTS = [(32, "group"), (128, "group"), (None, "channel"), (None, "tensor"), (None, "block")]

GRIDS = ["W4A16", "W4A16_ASYM", "W8A16", "W3A16_G64", "W2A16_G32"]


def test_schemes_that_differ_read_differently():
    every = list(product((2, 4, 8), LAYOUTS, (True, False), (True, False)))
    words = {
        scheme_in_words(bits, group_size, symmetric=symmetric, is_float=is_float, strategy=strategy)
        for bits, (group_size, strategy), symmetric, is_float in every
    }
    assert len(words) == len(every)


@pytest.mark.parametrize("name", [*GRIDS, "CB6D2_G64x32"])
def test_the_record_of_a_run_and_a_verification_say_the_same(name):
    pytest.importorskip("llmcompressor")
    from moeq_plugin.integrations.llm_compressor.allocation.options import parse_option

    assert parse_option(name).describe() == scheme_named(name).describe()
