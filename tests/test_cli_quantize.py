"""`moeq quantize`: what a person types, sees and is left with."""

import json
from pathlib import Path

import pytest
from helpers import int4, tiny_model, tokens
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("llmcompressor")

import typer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from moeq_plugin.cli import app
from moeq_plugin.cli.display import Timed
from moeq_plugin.cli.modifiers import of_recipe
from moeq_plugin.integrations.llm_compressor.moequant.run_state import RunState
from moeq_plugin.records.progress import Progress, listening
from moeq_plugin.records.run import RunRecord

runner = CliRunner()


@pytest.fixture
def tiny(tmp_path):
    """A random model that takes no time, with data that feed its experts well."""
    tiny_model("qwen3_moe", tmp_path / "model")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(128)}, "0"))
    ).save_pretrained(tmp_path / "model")
    write_data(tmp_path / "data.jsonl", 16)
    return tmp_path


def write_data(path, num_sequences):
    rows = tokens(num_sequences, 32).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))


def quantize(tiny, *arguments):
    request = ["quantize", str(tiny / "model"), str(tiny / "out"), *arguments]
    return runner.invoke(app, [*request, "--dataset", str(tiny / "data.jsonl")])


def test_it_shows_its_way_and_leaves_nothing_but_the_checkpoint(tiny):
    done = quantize(tiny, "--scheme", "W4A16_G32")
    assert done.exit_code == 0, done.output
    assert "quantize · 2 of 2 layers done · 32/32 linears" in done.stderr
    assert "save · writing 32 linears" in done.stderr
    assert "quantized 32 of 32 linears" in done.stdout
    assert {p.name for p in tiny.iterdir()} == {"model", "data.jsonl", "out"}
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= {
        p.name for p in (tiny / "out").iterdir()
    }


def test_json_lines_are_all_that_standard_output_holds(tiny):
    done = quantize(tiny, "--scheme", "W4A16_G32", "--jsonl")
    assert done.exit_code == 0, done.output
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    assert [s["phase"] for s in steps] == ["quantize"] * (len(steps) - 1) + ["save"]
    linears = [s["done"] for s in steps[:-1]]
    assert linears[0] == 0 and linears[-1] == 32 and linears == sorted(linears)
    assert all(s["worst_tokens"] > 0 and s["loss"] > 0 for s in steps if s["done"] > 0)


def test_an_interrupted_run_goes_on_only_when_told_to(tiny, monkeypatch):
    keep = RunState.keep_noted

    def interrupt(self):
        keep(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunState, "keep_noted", interrupt)
        stopped = quantize(tiny, "--scheme", "W4A16_G32")
    assert stopped.exit_code == 130
    assert "--resume continues from" in stopped.stderr
    assert not (tiny / "out").exists()

    again = quantize(tiny, "--scheme", "W4A16_G32")
    assert again.exit_code == 2
    assert "holds the state of an unfinished run" in again.stderr

    steps = []
    with listening(steps.append):
        resumed = quantize(tiny, "--scheme", "W4A16_G32", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert steps[0].phase == "quantize" and steps[0].done == 16
    assert not (tiny / "out.work").exists()


def test_a_preset_is_the_modifiers(tiny):
    done = quantize(tiny, "--scheme", "W4A16_G32", "--preset", "balanced")
    assert done.exit_code == 0, done.output
    (record,) = RunRecord.load(tiny / "out")
    assert record.settings["preset"] == "balanced"
    assert record.settings["refine_rounds"] > 0


@pytest.mark.parametrize("request_of", [("--scheme", "W4A16_G32"), ("--recipe", "recipe.yaml")])
def test_a_preset_that_cannot_be_meant(tiny, request_of):
    preset = "balanced" if "--recipe" in request_of else "quick"
    done = quantize(tiny, *request_of, "--preset", preset)
    assert done.exit_code == 2
    assert "preset" in done.stderr
    assert not (tiny / "out").exists()


def test_there_must_be_something_to_resume(tiny):
    done = quantize(tiny, "--scheme", "W4A16_G32", "--resume")
    assert done.exit_code == 2
    assert "there is no state of an unfinished run" in done.stderr


def test_strict_fails_where_experts_borrow_and_keeps_the_work(tiny):
    write_data(tiny / "data.jsonl", 2)
    done = quantize(tiny, "--scheme", "W4A16_G32", "--strict")
    assert done.exit_code == 1
    assert "linears were not quantized as asked" in done.stderr
    assert "effective tokens" in done.stderr
    assert not (tiny / "out").exists()

    lenient = quantize(tiny, "--scheme", "W4A16_G32", "--resume")
    assert lenient.exit_code == 0, lenient.output
    assert (tiny / "out" / "model.safetensors").exists()


def test_a_recipe_of_the_host(tiny):
    recipe = {"config_groups": int4(None, num_bits=8), "ignore": ["lm_head"]}
    (tiny / "recipe.yaml").write_text(
        json.dumps({"q_stage": {"q_modifiers": {"MoEQuantModifier": recipe}}})
    )
    done = quantize(tiny, "--recipe", str(tiny / "recipe.yaml"))
    assert done.exit_code == 0, done.output
    config = json.loads((tiny / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 8


def test_strict_counts_scales_too(tiny):
    write_data(tiny / "data.jsonl", 2)
    rounding = {"config_groups": int4(), "ignore": ["lm_head", "re:.*gate$"]}
    modifiers = {"MoEQuantAWQModifier": {"n_grid": 3}, "QuantizationModifier": rounding}
    (tiny / "recipe.yaml").write_text(json.dumps({"q_stage": {"q_modifiers": modifiers}}))

    done = quantize(tiny, "--recipe", str(tiny / "recipe.yaml"), "--strict")

    assert done.exit_code == 1, done.output
    assert "scales of model.layers.0.mlp.experts.0.up_proj: shrunk" in done.stderr
    assert "--resume" not in done.stderr  # such a recipe keeps no state
    assert not (tiny / "out").exists()


def test_an_existing_checkpoint_is_not_touched(tiny):
    (tiny / "out").mkdir()
    (tiny / "out" / "model.safetensors").write_text("months of work")
    done = quantize(tiny, "--scheme", "W4A16_G32")
    assert done.exit_code == 2
    assert "is not empty" in done.stderr
    assert [p.read_text() for p in (tiny / "out").iterdir()] == ["months of work"]


def test_data_that_are_something_else(tiny):
    (tiny / "data.jsonl").write_bytes(b"\x00\xff not json")
    done = quantize(tiny, "--scheme", "W4A16_G32")
    assert done.exit_code == 2
    assert "data.jsonl cannot be read as a data set" in done.stderr


def test_a_directory_that_cannot_be_written(tiny):
    (tiny / "file").write_text("")
    request = ["quantize", str(tiny / "model"), str(tiny / "file" / "out"), "--scheme", "W4A16"]
    done = runner.invoke(app, request)
    assert done.exit_code == 2
    assert "not a writable directory" in done.stderr


def test_time_left_is_told_from_the_phase_that_runs():
    now = iter([0.0, 10.0, 20.0, 100.0, 101.0])
    timed = Timed(["measure", "quantize", "save"], clock=lambda: next(now))
    first = timed.event(Progress("measure", 5, 25, "linears"))
    assert first["eta_s"] is None  # a resumed phase begins with what is done
    second = timed.event(Progress("measure", 10, 25, "linears"))
    assert second["eta_s"] == pytest.approx(30.0)
    assert second["then"] == ["quantize", "save"]
    assert timed.event(Progress("quantize", 0, 25, "linears"))["eta_s"] is None
    assert timed.event(Progress("quantize", 1, 25, "linears"))["elapsed_s"] == 101.0


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
names = st.sampled_from(
    ["q_stage", "q_modifiers", "MoEQuantModifier", "GPTQModifier", "scheme", "config_groups",
     "ebss", "targets", "bits_per_weight", "options", "weights", "args"]
) | st.text(max_size=10)  # fmt: skip
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


@settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(content=trees.map(json.dumps) | st.text(max_size=200) | st.binary(max_size=200))
@example(content="q_stage: [")
@example(content="q_stage:\n  q_modifiers:\n    MoEQuantModifier:\n      scheme: W4A17\n")
@example(content="q_stage:\n  q_modifiers:\n    MoEQuantModifer:\n      scheme: W4A16\n")
@example(content="")
@example(content=b"\xff\xfe")
def test_no_recipe_gives_a_traceback(content, tmp_path):
    path = Path(tmp_path) / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
    try:
        modifiers = of_recipe(path, tmp_path / "work")
    except (ValueError, OSError) as error:
        assert str(error)  # what `errors` turns into a message and exit code 2
    except typer.Exit:
        pytest.fail("ends without a message")
    else:
        assert modifiers
