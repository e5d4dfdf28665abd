import dataclasses
import math

import pytest
from written_checkpoint import EXPERTS, LAYERS, effective_tokens, record

from moeq_plugin.records.run import Basis, LinearRecord, RunRecord
from moeq_plugin.report import section_experts
from moeq_plugin.report.starved_rows import starved_rows


def charts(section):
    return {chart.name: chart for chart in section.charts}


def test_effective_tokens_are_the_fewest_of_an_experts_linears(found):
    linears = [
        LinearRecord(f"layers.0.mlp.experts.0.{kind}", "W4", Basis.OWN, tokens, None)
        for kind, tokens in (("gate_proj", 5.0), ("up_proj", 3.0), ("down_proj", 4.0))
    ]
    assert section_experts.effective_tokens(linears) == {0: {0: 3.0}}
    read = section_experts.effective_tokens(found.linears)
    assert read[2][5] == effective_tokens(2, 5)


def test_load_is_shown_in_one_scale_before_and_after_self_sampling(found):
    shown = charts(section_experts.experts_section(found))
    natural, sampled = (shown[f"load-{kind}"].data[0] for kind in ("natural", "sampled"))
    assert (natural["zmin"], natural["zmax"]) == (sampled["zmin"], sampled["zmax"])
    # both texts have the same load, 5 + layer + expert; even is its mean
    for layer in range(LAYERS):
        even = 5 + layer + (EXPERTS - 1) / 2
        expected = [math.log2((5 + layer + e) / even) for e in range(EXPERTS)]
        assert natural["z"][layer] == pytest.approx(expected)
    assert "expert 0<br>0 slots, 0.00" in sampled["text"][0][0]
    assert sampled["z"][0][0] == -3
    assert natural["y"] == sampled["y"] == ["0", "1", "2"]


def test_experts_that_borrowed_are_ringed_and_listed_the_worst_first(found):
    section = section_experts.experts_section(found)
    chart = charts(section)["effective-tokens"]
    cells, rings = chart.data
    assert set(zip(rings["y"], rings["x"], strict=True)) == {("0", 0), ("0", 1), ("1", 1)}
    assert "rounded to nearest" in cells["text"][1][1]
    assert cells["z"][2][5] == pytest.approx(math.log10(effective_tokens(2, 5)))
    table = section.parts[-1]
    assert [row[1] for row in table.rows] == [
        "rounded to nearest", "the layer's tokens only", "mixed with the layer's tokens",
    ]  # fmt: skip
    assert table.marked == {0}


def test_what_is_missing_says_how_to_get_it(found):
    found.quality, found.records = None, [dataclasses.replace(record(), sampling=None)]
    section = section_experts.experts_section(found)
    assert list(charts(section)) == ["effective-tokens"]
    assert "moeq eval" in section.missing[0]
    assert "without a data set" in section.missing[1]

    found.records = []
    assert "moeq quantize" in section_experts.experts_section(found).missing[0]


def test_a_model_without_experts_is_no_error(found):
    linears = [LinearRecord("blocks.0.att.key", "W3", Basis.OWN, 100.0, 0.5)]
    found.records, found.quality = [RunRecord("m", {}, {}, linears)], None
    section = section_experts.experts_section(found)
    assert section.charts == []
    assert "No routed experts" in section.notes[0]


def test_linears_of_an_expert_that_rest_on_the_same_share_a_row():
    def of(expert, *tokens, basis=Basis.SHRUNK):
        name = f"model.layers.0.mlp.experts.{expert}"
        kinds = ("gate_proj", "up_proj", "down_proj")
        return [
            LinearRecord(f"{name}.{kind}", "W4", basis, t, None)
            for kind, t in zip(kinds, tokens, strict=True)
        ]

    linears = [*of(0, 5.0, 5.0, 5.0), *of(1, 5.0, 5.0, 6.0), *of(2, 9.0, 9.0, 9.0, basis=Basis.OWN)]
    linears.sort(key=lambda linear: linear.name.endswith("down_proj"))  # as stacks are solved
    rows = starved_rows(linears)
    names = [row.name.removeprefix("model.layers.0.mlp.experts.") for row in rows]
    assert names == ["0.*", "1.gate_proj", "1.up_proj", "1.down_proj"]
    assert [row.effective_tokens for row in rows] == [5.0, 5.0, 5.0, 6.0]
