import pytest
from written_checkpoint import choice, traces

from moeq_plugin.report.section_pareto import pareto_section


def test_the_front_shows_the_checkpoint_and_uniform_options(found):
    found.front = [{"num_bytes": 5000, "bits_per_weight": 4.0, "loss": 0.4, "counts": {"W4A16": 9}}]
    shown = traces(pareto_section(found), "pareto")
    assert shown["best for its size"]["x"] == [5]
    assert shown["this checkpoint"]["y"] == [0.5]
    uniform = shown["one option for all"]
    assert len(uniform["x"]) == 3
    rows = len(choice())
    assert uniform["y"][0] == pytest.approx(sum(1 + row for row in range(rows)) * 1e-2)
    assert uniform["x"][0] == pytest.approx((rows * 136 + 1000) / 1e3)


def test_a_ratio_is_not_put_among_losses(found):
    found.front = [{"num_bytes": 5000, "bits_per_weight": 4.0, "loss": 0.4, "counts": {"W4A16": 9}}]
    found.allocation["robust"] = True
    assert "this checkpoint" not in traces(pareto_section(found), "pareto")


def test_without_sensitivities_the_front_says_how_to_get_it(found):
    found.table = None
    assert "moeq plan" in pareto_section(found).missing[0]
