from pathlib import Path

import pytest

pytest.importorskip("llmcompressor")

from datasets import load_dataset
from typer.testing import CliRunner

from moeq_plugin.cli import app

runner = CliRunner()
MODEL = str(Path(__file__).parents[1] / "examples" / "assets" / "tiny_moe")


def test_sample_writes_a_set_that_any_tool_reads(tmp_path):
    out = tmp_path / "set.jsonl"

    done = runner.invoke(
        app, ["sample", MODEL, str(out), "--num-sequences", "2", "--seq-len", "16"]
    )

    assert done.exit_code == 0, done.output
    assert "2 sequences, 32 tokens" in done.output
    rows = load_dataset(
        "json", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [len(ids) for ids in rows["input_ids"]] == [16, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tau", "0"], "tau must be positive"),
        (["--beam-width", "0"], "beam_width must be at least 1"),
        (["--seq-len", "4096"], "1024"),
    ],
    ids=["tau", "beam", "too-long"],
)
def test_a_wrong_request_is_a_message_and_exit_code_2(arguments, message, tmp_path):
    done = runner.invoke(app, ["sample", MODEL, str(tmp_path / "set.jsonl"), *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "set.jsonl").exists()


def test_a_model_that_is_not_there(tmp_path):
    done = runner.invoke(app, ["sample", str(tmp_path / "no-model"), str(tmp_path / "set.jsonl")])
    assert done.exit_code == 2
    assert "no-model" in done.output


def test_help_loads_no_framework():
    import subprocess
    import sys

    code = "import sys; from moeq_plugin.cli import app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
