import pytest
from written_checkpoint import borrowing, verified, write_checkpoint

from moeq_plugin.report.comparison import comparison_section, overall
from moeq_plugin.report.directory import read_directory


@pytest.fixture
def three(tmp_path):
    """A sound one, a smaller sound one, and the smallest, whose experts starved."""
    several = []
    for number, name in enumerate(("w8", "w4", "w2")):
        found = read_directory(write_checkpoint(tmp_path / name))
        found.stored = type(found.stored)(3000 - 1000 * number, 10**6, 1000, 2000)
        found.verification = verified()
        found.quality.tasks.clear()
        several.append(found)
    borrowing(several[2], 75)
    return several


def test_the_smallest_of_the_best_is_named(three):
    verdict = overall(three)
    assert verdict.decision.word.endswith(": w4")
    assert verdict.line == "w4 is the smallest of the 2 that the rules judge so."


def test_of_two_as_small_the_one_that_loses_less_is_named(three):
    for found, kl in zip(three, (0.5, 0.2, 0.1), strict=True):
        found.stored = type(found.stored)(2000, 10**6, 1000, 2000)
        found.quality.texts[found.quality.worst_text]["kl"] = kl
    verdict = overall(three)  # the last one starved
    assert verdict.decision.word.endswith(": w4")
    assert verdict.line == "w4 loses least of the 2 smallest that the rules judge so."


def test_each_has_a_row_and_its_reasons(three):
    table, chart, reasons = comparison_section(three).parts
    assert [row[0] for row in table.rows] == ["w8", "w4", "w2"]
    assert "recovery of the worst task" not in table.head  # nobody has any
    assert all(len(row) == len(table.head) for row in table.rows)
    assert [row[2] for row in table.rows] == ["3 kB", "2 kB", "1 kB"]
    assert table.marked == {2}
    assert [trace["x"] for trace in chart.data] == [[3.0], [2.0], [1.0]]
    assert {row[0] for row in reasons.rows} == {"w8", "w4", "w2"}


def test_who_was_not_evaluated_is_named_beside_the_plot(three):
    (chart,) = comparison_section(three).charts
    assert "Not evaluated" not in chart.caption
    three[1].quality = None
    (chart,) = comparison_section(three).charts
    assert chart.caption.endswith("Not evaluated, and so not in it: w4.")


def test_without_evaluations_there_is_no_chart(three):
    for found in three:
        found.quality = None
    assert comparison_section(three).charts == []
