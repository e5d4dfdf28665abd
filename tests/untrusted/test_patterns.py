"""Patterns mean what `re` means, and none runs away."""

import re
import time

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from moeq_plugin.untrusted.automaton import Automaton
from moeq_plugin.untrusted.patterns import (
    MAX_NAME,
    check_content,
    check_for_readers,
    compiled,
    parser,
)
from moeq_plugin.untrusted.ways import most_ways

CATASTROPHIC = [
    "(a+)+$",
    "([a-zA-Z]+)*$",
    "(a|aa)+$",
    "(a|a?)+$",
    "(.*a){20}$",
    "(a*)*$",
    "(a*?)*?$",
    "^(([a-z])+.)+[A-Z]([a-z])+$",
    "(x+x+)+y",
    ".*.*.*.*.*.*.*=",
    "(?=(a+)+$)a",
    "(?!(a|a)*$)b",
    "(?i:(A|a)+)+$",
    "(a?){30}a{30}$",
    "((a|b)*(b|a)*)*c",
    "(a{1,20}){1,20}$",
]
pieces = st.sampled_from(
    ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "^", "$", r"\b", r"\B", r"\A", r"\Z", ""]
)
repeats = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,}", "{2,3}?"])
patterns = st.recursive(
    pieces,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(st.sampled_from(["(", "(?:", "(?=", "(?!", "(?i:", "(?s:"]), inner).map(
            lambda part: f"{part[0]}{part[1]})"
        ),
        st.tuples(inner, repeats).map(lambda part: f"(?:{part[0]}){part[1]}"),
    ),
    max_leaves=7,
)
names = st.text(alphabet="abA1.\n", max_size=7)


@settings(max_examples=500, deadline=None)
@given(pattern=patterns, texts=st.lists(names, min_size=1, max_size=6))
@example(pattern="a$", texts=["a", "a\n", "a\n\n", "ab"])
@example(pattern=r"(?:a|\b)*b$", texts=["aab", "b", "ab\n"])
@example(pattern="(?m)(?:^|a)*$", texts=["a\nb", "", "\n"])
def test_an_automaton_matches_what_re_matches(pattern, texts):
    assume(most_ways(parser.parse(pattern), 8) < 1e6)  # or `re` would not come to an end
    automaton = Automaton(parser.parse(pattern))
    for text in texts:
        assert automaton.match(text) == (re.match(pattern, text) is not None), text


@pytest.mark.parametrize("pattern", CATASTROPHIC)
def test_no_pattern_runs_away(pattern):
    matcher, began = compiled(pattern), time.process_time()
    for text in (
        "a" * MAX_NAME,
        "a" * (MAX_NAME - 1) + "!",
        "xa" * (MAX_NAME // 2),
        "A" * 60 + "b",
    ):
        matcher.match(text)
    assert time.process_time() - began < 1
    assert matcher.match("a" * 9 + "!") == (re.match(pattern, "a" * 9 + "!") is not None)


@pytest.mark.parametrize("pattern", [p for p in CATASTROPHIC if "(?=" not in p])
def test_readers_are_not_given_a_pattern_that_runs_away(pattern):
    with pytest.raises(ValueError, match="ways"):
        check_for_readers(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*layers\.1\.(mlp|block_sparse_moe)\.experts.*",
        r".*self_attn\.(q|k|v|o)_proj$",
        r"^(?!.*(experts|shared)).*$",
        r"model\.layers\.\d+\.mlp\.experts\.\d+\..*",
        r"model\.layers\.([0-9]|1[0-9]|2[0-3])\.mlp\.gate$",
        r".*\.(?:w1|w2|w3)",
        ".*layers.0.*experts.*_proj$",
        r".*model.*layers.*experts.*(gate|up|down)_proj",
        "lm_head",
    ],
)
def test_what_people_write_is_read_by_everyone(pattern):
    check_for_readers(pattern)
    assert compiled(pattern) is not None


def test_patterns_are_found_wherever_they_are():
    for content in (
        {"quantization_config": {"config_groups": {"a": {"targets": ["Linear", "re:(a+)+$"]}}}},
        {"quantization_config": {"ignore": ["re:(a+)+$"]}},
        {"quantization_config": {"dynamic": {"-:(a+)+$": {}}}},
    ):
        with pytest.raises(ValueError, match="ways"):
            check_content(content)
    check_content({"ignore": ["(a+)+$", "re:.*gate$", 3, None], "dynamic": {"+:.*": {"bits": 8}}})


@pytest.mark.parametrize(
    "pattern",
    ["(", "(a+)+\\1$", "(?<=a)(a+)+$", "(a{50}){100}(b+)+", "(a{1,60}){1,60}$",
     "(" * 5000, "a" * 30_000,
     "(?:){4000000000}(a+)+$", "(?:(?:)|(?:)){4000000000}"],
)  # fmt: skip
def test_what_cannot_be_matched_in_bounded_time_is_refused(pattern):
    with pytest.raises(ValueError, match="pattern"):
        compiled(pattern)


def test_a_pattern_that_needs_references_and_cannot_run_away_is_left_to_re():
    assert compiled(r"(a|b)\1").match("aa")
    assert compiled(r"(?<=a)b").match("b") is None
