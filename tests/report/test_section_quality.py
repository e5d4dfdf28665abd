import pytest

from moeq_plugin.report.section_quality import quality_section


def test_the_worst_text_task_and_layer_are_named(found):
    text, task, layer = quality_section(found).notes
    assert text == "Worst text: code, mean KL 0.02 nats per token."
    assert task == "Worst task: hard, recovery 80.0 %."
    assert "model.layers.2.mlp (on code): 77.0 %" in layer


def test_texts_are_columns_with_errors(found):
    table = quality_section(found).parts[0]
    assert table.head == ["", "prose", "code"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["KL mean (nats)"] == ["0.01000 ± 0.00050", "0.0200 ± 0.0010"]
    assert rows["tokens predicted"] == ["1000", "1000"]


def test_tasks_are_rows_the_worst_marked_and_the_average_last(found):
    table = quality_section(found).parts[1]
    assert table.marked == {1}
    assert table.rows[1] == ["hard", "exact_match", "0.500 ± 0.020", "0.400 ± 0.020", "80.0 %"]
    assert table.rows[2][1] == "perplexity (less is better)"
    assert table.rows[-1][-1].startswith("86.")  # the mean of 98.75, 80 and 80


def test_routing_is_shown_by_layer_for_every_text(found):
    jaccard, router = quality_section(found).charts
    assert [trace["name"] for trace in jaccard.data] == ["prose", "code"]
    assert jaccard.data[1]["y"] == pytest.approx([0.97, 0.87, 0.77])
    assert router.data[0]["error_y"]["array"] == [1e-4] * 3


def test_models_without_routers_have_no_chart(found):
    for text in found.quality.texts.values():
        text["routing"] = None
    section = quality_section(found)
    assert section.charts == []
    rows = {row[0]: row[1:] for row in section.parts[0].rows}
    assert rows["router KL (nats)"] == ["–", "–"]


def test_without_an_evaluation_it_says_how_to_get_one(found):
    found.quality = None
    assert "moeq eval BASE QUANT" in quality_section(found).missing[0]
