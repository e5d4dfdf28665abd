"""The first target that fits is the same whether names are looked up or tried one by one."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from moeq_plugin.checkpoint.targets import Targets

names = st.sampled_from(["a.b", "a.b.c", "axb", "a", "b.gate", "a.b_proj"])
targets = st.one_of(
    names,
    st.sampled_from(["re:a", r"re:a\.b$",  r"re:^a\.b$",
                     r"re:a.b$", r"re:.*gate$", r"re:^a\.b_proj$",
                     "re:(a|b)+", "Linear", r"re:a\.b", "re:"]),
)  # fmt: skip


def fits(target, name):
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return name == target


@settings(max_examples=300, deadline=None)
@given(listed=st.lists(targets, max_size=6), name=names)
def test_the_first_target_that_fits_is_found(listed, name):
    expected = next((target for target in listed if fits(target, name)), None)
    assert Targets(listed).first(name) == expected
    assert (name in Targets(listed)) == (expected is not None)


def test_thousands_of_exact_names_are_no_patterns_to_try():
    listed = [f"layers.{number}.up_proj" for number in range(2000)]
    listed += [rf"re:^layers\.{number}\.down_proj$" for number in range(2000)]
    found = Targets([*listed, "re:.*gate$"])
    assert found.num_patterns == 1
    assert found.first("layers.7.down_proj") == r"re:^layers\.7\.down_proj$"
