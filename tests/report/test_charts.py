import math

import pytest

from moeq_plugin.report.charts import Scale, heatmap, log_axis, log_scale, plot, whole_numbers

SCALE = Scale("tokens", 0, 1, {0.0: "1"})


def test_every_chart_is_one_that_plotly_knows():
    figures = pytest.importorskip("plotly.graph_objects")
    cells = heatmap("h", "c", [0, 1], [[0, 1], [1, None]], [["", ""], ["", ""]], SCALE, [(0, 1)])
    lines = plot("p", "c", [{"type": "scatter", "name": "n", "x": [1], "y": [2]}],
                 x={"title": {"text": "x"}}, y=log_axis("y", [1, 100]))  # fmt: skip
    for chart in (cells, lines):
        # colours are named after variables of the page: any colour stands for them here
        text = str({"data": chart.data, "layout": chart.layout})
        for name in ("low", "middle", "high", "scale0", "scale1", "scale2", "mark"):
            text = text.replace(f"'${name}'", "'#fff'")
        assert "$" not in text
        figures.Figure(eval(text))  # raises where a property or a value is unknown


def test_a_mark_sits_on_its_cell():
    chart = heatmap("h", "c", [4, 9], [[0, 1], [1, 0]], [["", ""], ["", ""]], SCALE, [(1, 0)])
    assert (chart.data[1]["x"], chart.data[1]["y"]) == ([0], ["9"])


def test_ticks_of_a_log_scale_are_round_and_inside():
    scale = log_scale("t", [0.0, 30.0, 2500.0])
    assert scale.low == math.log10(30)
    assert list(scale.ticks.values()) == ["50", "100", "200", "500", "1k", "2k"]
    wide = log_scale("t", [1e-4, 1e3])
    assert list(wide.ticks.values())[:2] == ["0.0001", "0.001"]


def test_a_scale_of_equal_values_does_not_blow_up_noise():
    scale = log_scale("t", [100.0, 100.0])
    assert scale.high - scale.low == pytest.approx(0.3)
    assert log_scale("t", []).ticks


@pytest.mark.parametrize(
    ("count", "step"), [(4, 1), (16, 1), (48, 4), (64, 4), (128, 16), (100_000, 256)]
)
def test_a_phone_has_room_for_sixteen_ticks(count, step):
    assert whole_numbers(count)["dtick"] == step
