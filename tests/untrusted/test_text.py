"""Text only shows, and records have fields of the types that they say."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeq_plugin.untrusted.text import harmless, markdown, one_line
from moeq_plugin.untrusted.typed import build


@given(st.text())
def test_any_text_becomes_one_printable_line(text):
    for shown in (harmless(text), one_line(text), markdown(text)):
        assert shown.isprintable()
    if text.isprintable():
        assert harmless(text) == text
    assert "<" not in markdown(text)


@given(st.text(min_size=30))
def test_a_line_has_a_length(text):
    assert len(harmless("a" * 5000)) == 2000
    assert harmless("a" * 5000).endswith("...")
    assert harmless(text, 10) == harmless(text[:7] + "...", 10)


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    number: int
    share: float | None
    colour: Colour


@dataclass(frozen=True)
class Outer:
    inner: list[Inner]
    named: dict[str, Inner]
    anything: dict[str, Any]
    is_so: bool = False
    names: list[str] = field(default_factory=list)


INNER = {"number": 1, "share": 0.5, "colour": "red"}
OUTER = {"inner": [INNER], "named": {"a": INNER}, "anything": {"b": [None]}}


def test_plain_data_becomes_a_record():
    inner = Inner(1, 0.5, Colour.RED)
    assert build(Outer, OUTER) == Outer([inner], {"a": inner}, {"b": [None]})
    assert build(Inner, {**INNER, "share": None}).share is None


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"inner": None}, "Outer.inner"),
        ({"inner": [1]}, "Outer.inner"),
        ({"inner": [{**INNER, "number": True}]}, "Outer.inner.number must be int, got True"),
        ({"inner": [{**INNER, "number": 1.5}]}, "number"),
        ({"inner": [{**INNER, "share": "x"}]}, "share"),
        ({"inner": [{**INNER, "colour": "blue"}]}, "blue"),
        ({"inner": [{**INNER, "other": 1}]}, "unknown .*other"),
        ({"named": {"a": {"number": 1}}}, "missing"),
        ({"anything": []}, "anything"),
        ({"is_so": 1}, "is_so"),
        ({"names": "abc"}, "names"),
    ],
)
def test_a_field_of_another_type_is_named(change, where):
    with pytest.raises(ValueError, match=where):
        build(Outer, {**OUTER, **change})
