import sys

import pytest
from typer.testing import CliRunner
from written_checkpoint import write_checkpoint

pytest.importorskip("plotly")

from moeq_plugin.cli import app

runner = CliRunner()


def invoke(*arguments):
    return runner.invoke(app, ["report", *map(str, arguments)])


def test_the_page_lies_beside_the_weights(tmp_path):
    done = invoke(write_checkpoint(tmp_path / "w4"))
    assert done.exit_code == 0, done.output
    text = (tmp_path / "w4" / "report.html").read_text()
    assert "<h1>w4</h1>" in text
    assert "best for its size" in text  # the front was solved


def test_page_and_card_go_where_they_are_wanted(tmp_path):
    write_checkpoint(tmp_path / "w4")
    done = invoke(tmp_path / "w4", "--out", tmp_path / "a.html", "--card", tmp_path / "card.md")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "a.html").exists()
    assert "Worst task: hard" in (tmp_path / "card.md").read_text()
    assert not (tmp_path / "w4" / "report.html").exists()


def test_an_evaluation_elsewhere_is_taken(tmp_path):
    write_checkpoint(tmp_path / "w4")
    (tmp_path / "w4" / "moeq_eval.json").rename(tmp_path / "e.json")
    invoke(tmp_path / "w4", "--evaluation", tmp_path / "e.json")
    assert "Worst text: code" in (tmp_path / "w4" / "report.html").read_text()


def test_several_are_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(write_checkpoint(tmp_path / "w4"), write_checkpoint(tmp_path / "w3"))
    assert done.exit_code == 0, done.output
    text = (tmp_path / "comparison.html").read_text()
    assert "<h1>2 checkpoints compared</h1>" in text
    assert "Side by side" in text


def test_nothing_is_written_into_a_model_that_is_not_quantized(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    done = invoke(tmp_path)
    assert done.exit_code == 2
    assert "is not quantized; --out FILE" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_table_that_cannot_be_solved_is_a_gap_and_a_warning(tmp_path):
    path = write_checkpoint(tmp_path) / "moeq_sensitivity.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 9'))
    done = invoke(tmp_path)
    assert done.exit_code == 0, done.output
    assert "schema version 9" in done.output
    assert "No table of sensitivities" in (tmp_path / "report.html").read_text()


def test_a_wrong_request_is_a_message_and_exit_code_2(tmp_path, monkeypatch):
    for arguments, message in (
        ([tmp_path / "none"], "none is not there"),
        ([tmp_path], "neither moeq_run.json nor config.json"),
        ([write_checkpoint(tmp_path / "w4"), "--evaluation", "no.json"], "no.json is not a file"),
        ([tmp_path / "w4", "--out", tmp_path / "no" / "r.html"], "r.html"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2, done.output
        assert message in done.output
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = invoke(tmp_path / "w4")
    assert done.exit_code == 2
    assert "pip install 'moeq-plugin[report]'" in done.output
