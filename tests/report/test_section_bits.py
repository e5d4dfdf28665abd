import pytest
from written_checkpoint import choice, traces

from moeq_plugin.report.section_bits import bits_section


def test_bars_are_true_bits_of_experts_and_of_the_rest(found):
    shown = traces(bits_section(found), "bits")
    of_layer_1 = (7 * 4.125 + 8.125) / 8
    assert shown["routed experts"]["y"] == pytest.approx([2.125, of_layer_1, 4.125])
    assert shown["other linears"]["y"] == pytest.approx([8.125] * 3)
    assert "21 × W4A16, 3 × W8A16" in shown["routed experts"]["hovertext"][1]
    assert shown["budget, 4.5 on average"]["y"] == [4.5, 4.5]


def test_experts_that_differ_get_a_map(found):
    cells = traces(bits_section(found), "bits-of-experts")[None]
    assert cells["z"][1] == pytest.approx([4.125] * 3 + [8.125] + [4.125] * 4)

    found.allocation["choice"] = dict.fromkeys(choice(), "W4A16")
    assert [chart.name for chart in bits_section(found).charts] == ["bits"]


def test_without_a_table_bits_are_those_of_the_schemes_name(found):
    found.table = found.allocation = None
    section = bits_section(found)
    assert traces(section, "bits")["routed experts"]["y"] == [4, 4, 4]
    assert len(traces(section, "bits")) == 2
    assert "bits_per_weight=" in section.missing[0]


def test_without_a_record_there_is_a_sentence(found):
    found.table = found.allocation = None
    found.records = []
    assert bits_section(found).charts == []
    assert bits_section(found).missing
