"""The probe: what is measured on a few layers, extrapolated to all of them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeq_plugin.cli import app
from moeq_plugin.cli.probe import _extrapolate, _phases

TINY = Path(__file__).parents[2] / "examples" / "assets" / "tiny_moe"
TIMES = {
    "start": 10.0, "load": 2.0, "prepare": 4.0, "save": 6.0, "passes": 8.0, "solve": 3.0,
    "layer_passes": 2.0, "layer_solve": 1.0,
}  # fmt: skip


def test_what_was_measured_is_not_changed_by_extrapolating_to_itself():
    total = sum(seconds for phase, seconds in TIMES.items() if not phase.startswith("layer"))
    assert _extrapolate(TIMES, num_layers=2, cut=2, more_data=1) == total


def test_a_further_layer_costs_its_passes_its_rounding_and_its_share_of_saving():
    two = _extrapolate(TIMES, num_layers=2, cut=2, more_data=4)
    three = _extrapolate(TIMES, num_layers=3, cut=2, more_data=4)
    assert three - two == 4 * 2.0 + 1.0 + (4.0 + 6.0) / 2


def test_more_data_costs_more_passes_and_nothing_else():
    once, thrice = (_extrapolate(TIMES, num_layers=4, cut=2, more_data=n) for n in (1, 3))
    assert thrice - once == 2 * (8.0 + 2 * 2.0)


def test_phases_are_told_apart_by_the_marks_between_them():
    """Two layers and the output embedding, each passed and solved, and the end of calibration."""
    names = ["start", "loaded", "prepared", *["passed", "solved"] * 4, "saved"]
    times = [0, 1, 3, 6, 10, 15, 21, 28, 36, 45, 55, 66]
    marks = [(name, (at, 2 * at)) for name, at in zip(names, times, strict=True)]

    found = _phases(marks, 0)

    assert found == {
        "start": 0, "load": 1, "prepare": 2, "passes": 3 + 5 + 7 + 9, "solve": 4 + 6 + 8 + 10,
        "layer_passes": 5, "layer_solve": 6, "save": 11,
    }  # fmt: skip
    assert _phases(marks, 1)["layer_passes"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_G32"])
def test_plan_predicts_from_a_run_on_three_layers(scheme, tmp_path):
    rows = [[token % 2048 for token in range(start, start + 32)] for start in range(4)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))

    words = ["--probe", "--scheme", scheme, "--dataset", str(data)]
    done = CliRunner().invoke(app, ["plan", str(TINY), *words])

    assert done.exit_code == 0, done.output
    assert "probe of 3 layers on 4 sequences: quantizing takes" in done.output


def test_a_probe_needs_data():
    done = CliRunner().invoke(app, ["plan", str(TINY), "--probe"])
    assert done.exit_code == 2
    assert "--probe needs --dataset FILE" in done.output


@pytest.mark.slow
def test_what_quantizing_would_fail_on_is_said_by_the_probe(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"input_ids": [1, 100000]}\n')  # no row of the embedding

    done = CliRunner().invoke(app, ["plan", str(TINY), "--probe", "--dataset", str(data)])

    assert done.exit_code == 2
    assert "quantizing the first 3 layers failed" in done.output
