"""What can be known before calibration ends `moeq quantize` with code 2, one line, and no trace."""

import json

import pytest
from helpers import int4, tiny_model, tokens

pytest.importorskip("llmcompressor")

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from moeq_plugin.cli import app

IDS = {"input_ids": list(range(1, 40))}
ONLY_ATTENTION = {"config_groups": int4(), "ignore": ["lm_head", "re:.*experts.*"]}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("qwen3_moe", path)
    words = {str(i): i for i in range(128)}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "0")))
    made.model_max_length = 64
    made.save_pretrained(path)
    return path


def quantize(model, folder, rows, *more):
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["quantize", str(model), str(folder / "out"), "--dataset", str(folder / "data.jsonl")]
    return CliRunner().invoke(app, [*command, *(more or ("--scheme", "W4A16_G32"))])


def check_refused(done, folder, *kept):
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if not line.startswith("calibrating on ")]
    assert len(lines) <= 2
    assert lines[0].startswith("moeq quantize: ")
    assert {p.name for p in folder.iterdir()} == {"data.jsonl", *kept}


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([IDS, {"input_ids": []}], (), "1 of 2 rows have no `input_ids` to calibrate on"),
        ([{"text": "1 2"}, {"text": ""}], (), "1 of 2 rows have no `text` to calibrate on"),
        ([{"input_ids": [4, 99999]}], (), "token id 99999"),
        ([{"input_ids": [4, -1]}], (), "token id -1"),
        ([{"text": "1"}, IDS], (), "1 of 2 rows have no `input_ids`"),
        ([{"text": None}, {"text": "1"}], (), "1 of 2 rows have no `text`"),
        ([{"prompt": "1"}], (), "the columns prompt"),
        ([{"input_ids": ["a"]}], (), "expected lists of integers"),
        ([{"input_ids": 5}], (), "expected lists of integers"),
        ([{"text": 5}], (), "holds int64"),
        ([IDS], ("--num-calibration-samples", "0"), "is needed, 0 were asked for"),
        ([IDS], ("--num-calibration-samples", "-3"), "is needed, -3 were asked for"),
        ([IDS], ("--max-seq-length", "0"), "max_seq_length is 0"),
    ],
)
def test_wrong_data(rows, more, said, model_path, tmp_path):
    done = quantize(model_path, tmp_path, rows, "--scheme", "W4A16_G32", *more)
    check_refused(done, tmp_path)
    assert said in done.stderr
    right = quantize(model_path, tmp_path, [IDS] * 8)  # the corrected call is not in its way
    assert right.exit_code == 0, right.output


def test_generation_settings_that_cannot_be_saved(model_path, tmp_path):
    import shutil

    shutil.copytree(model_path, tmp_path / "model")
    settings = {"do_sample": False, "temperature": 0.000001}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    done = quantize(tmp_path / "model", tmp_path, [IDS])
    check_refused(done, tmp_path, "model")
    assert "generation_config cannot be saved" in done.stderr


def test_two_modifiers_for_the_same_weights(model_path, tmp_path):
    modifiers = {"MoEQuantModifier": ONLY_ATTENTION, "GPTQModifier": ONLY_ATTENTION}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"a_stage": {"a_modifiers": modifiers}}))
    done = quantize(model_path, tmp_path, [IDS], "--recipe", str(recipe))
    assert done.exit_code == 2, done.output
    assert "both quantize 8 modules" in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"data.jsonl", "recipe.yaml"}


@pytest.mark.parametrize(("num_tokens", "code"), [(1, 1), (64, 0)])
def test_strict_looks_at_attention_too(num_tokens, code, model_path, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    content = {"a_stage": {"a_modifiers": {"MoEQuantModifier": ONLY_ATTENTION}}}
    recipe.write_text(json.dumps(content))
    rows = [{"input_ids": tokens(1, num_tokens)[0].tolist()}]
    done = quantize(model_path, tmp_path, rows, "--recipe", str(recipe), "--strict")
    assert done.exit_code == code, done.output
    if code:
        assert "model.layers.0.self_attn.q_proj: few, 1.0 effective tokens" in done.stderr
