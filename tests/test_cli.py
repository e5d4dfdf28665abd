import json
from collections import Counter
from pathlib import Path

import pytest
from helpers import tiny_model, tokens

pytest.importorskip("llmcompressor")

from datasets import load_dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from moeq_plugin.cli import app
from moeq_plugin.core.allocation import Allocation
from moeq_plugin.core.sensitivity import SensitivityTable

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
        (["--tau", "0"], "tau must be None or positive"),
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


@pytest.fixture
def tiny(tmp_path):
    """A random model that takes no time, with data."""
    model = tiny_model("qwen3_moe", tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(128)}, "0"))
    )
    tokenizer.save_pretrained(tmp_path / "model")
    rows = tokens(8, 32).tolist()
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"input_ids": r}) + "\n" for r in rows))
    del model
    return tmp_path


def test_a_plan_is_measured_once_and_quantized_from(tiny):
    names = ["W2A16_G16", "W3A16_G16", "W4A16_G16"]
    options = [argument for name in names for argument in ("--option", name)]
    table, allocation = tiny / "table.json", tiny / "allocation.json"
    request = ["plan", str(tiny / "model"), "--sensitivity", str(table), *options]
    request += ["--dataset", str(tiny / "data.jsonl"), "--bits-per-weight", "4.5"]
    measured = runner.invoke(app, [*request, "--allocation", str(allocation)])
    assert measured.exit_code == 0, measured.output
    before = table.read_bytes()

    again = runner.invoke(app, [*request, "--bits-per-weight", "5.5"])
    assert again.exit_code == 0, again.output
    assert again.output.count("bits per weight") == 2
    assert table.read_bytes() == before

    for_programs = runner.invoke(app, [*request, "--json"])
    (found,) = json.loads(for_programs.stdout)["allocations"]
    chosen = Allocation.load(allocation)
    assert found["num_linears"] == Counter(chosen.choice.values())
    assert found["tensor_bytes"] == chosen.num_bytes + SensitivityTable.load(table).fixed_bytes
    assert found["predicted_loss"] == pytest.approx(chosen.value)

    request = ["quantize", str(tiny / "model"), str(tiny / "out"), "--allocation", str(allocation)]
    done = runner.invoke(app, [*request, "--dataset", str(tiny / "data.jsonl")])
    assert done.exit_code == 0, done.output
    assert (tiny / "out" / "moeq_allocation.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of --scheme"),
        (["--scheme", "W4A16", "--size-gb", "1"], "exactly one of --scheme"),
        (["--scheme", "W4A17"], "'W4A17' is not a scheme"),
        (["--bits-per-weight", "0.5"], "0.5 is too small"),
        (["--allocation", "no.json"], "no.json"),
        (["--scheme", "W4A16", "--dataset", "no.jsonl"], "no.jsonl is not a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_wish_is_a_message_and_exit_code_2(arguments, message, tmp_path):
    done = runner.invoke(app, ["quantize", MODEL, str(tmp_path / "out"), *arguments])
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there(tmp_path):
    done = runner.invoke(app, ["sample", str(tmp_path / "no-model"), str(tmp_path / "set.jsonl")])
    assert done.exit_code == 2
    assert "no-model" in done.output


def test_help_loads_no_framework():
    import subprocess
    import sys

    code = "import sys; from moeq_plugin.cli import app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
