"""Whatever is asked for wrongly: exit code 2, a line or two, no traceback, nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llmcompressor")

from typer.testing import CliRunner

from moeq_plugin.cli import app

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
MODEL = str(ASSETS / "tiny_moe")
W4 = ("--scheme", "W4A16")
RECIPES = {
    "bad.yaml": "a: [",
    "empty.yaml": "",
    "unknown.yaml": "s_stage:\n  s_modifiers:\n    NoModifier: {}\n",
    "field.yaml": "s_stage:\n  s_modifiers:\n    MoEQuantModifier: {affinty_power: 1}\n",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"def main(): return {number}"} for number in range(20)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("columns.jsonl").write_text('{"question": "a"}\n')
    Path("empty.jsonl").write_text("")
    Path("blank.txt").write_text("\n")
    Path("sheet.xlsx").write_text("PK")
    Path("a_folder").mkdir()
    Path("bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("bare", name).symlink_to(Path(MODEL, name))
    for name, text in RECIPES.items():
        Path(name).write_text(text)
    return tmp_path


def quantize(*arguments, data="data.jsonl"):
    return ["quantize", MODEL, "out", *arguments, "--dataset", data, "--max-seq-length", "64"]


WRONG = [
    (quantize("--scheme", "int4"), "did you mean W4A16"),
    (quantize(*W4, "--target", "foo"), "--target: expected one of vllm, gguf"),
    (quantize(*W4, "--preset", "quick"), "--preset: expected one of fast"),
    (quantize("--scheme", "W5.5A16"), "'W5.5A16' is not a scheme; did you mean W5A16"),
    (quantize("--bits-per-weight", "3", "--option", "W3A61"), "'W3A61' is not a scheme"),
    (quantize(*W4, data="blank.txt"), "blank.txt has no row: there is nothing but blanks in it"),
    (quantize(*W4, "--affinity-power", "-1"), "affinity_power: expected greater than"),
    (quantize(*W4, "--weight-observer", "nope"), "--weight-observer: expected one of"),
    (quantize(*W4, "--dtype", "float31"), "--dtype: expected one of"),
    (quantize(*W4, "--batch-size", "0"), "--batch-size: expected a number"),
    (quantize(*W4, "--num-calibration-samples", "0"), "0 were asked for"),
    ([*quantize(*W4)[:-1], "-5"], "max_seq_length is -5"),
    (quantize(*W4, "--option", "W3A16"), "--option is for a budget"),
    (quantize(*W4, "--ignore", "re:("), "--ignore: '(' is no pattern"),
    (quantize("--scheme", "W4A16_G48"), "use group_size 128 for these modules"),
    (quantize(*W4, "--shceme", "W4A16"), "no such option: --shceme"),
    (quantize(*W4, "--seed", "many"), "invalid value for '--seed'"),
    (quantize(*W4, "--size-gb", "3"), "exactly one of"),
    (quantize("--bits-per-weight", "0.5"), "0.5 is too small: for target 'vllm' the options"),
    (quantize("--recipe", "bad.yaml"), "is not a recipe"),
    (quantize("--recipe", "unknown.yaml"), "NoModifier"),
    (quantize("--recipe", "empty.yaml"), "expected stages by name"),
    (quantize("--recipe", "field.yaml"), "affinty_power"),
    (quantize("--recipe", "field.yaml", "--seed", "3"), "--seed is a line of the recipe"),
    (quantize("--recipe", "none.yaml"), "none.yaml"),
    (quantize(*W4, data="columns.jsonl"), "the columns question"),
    (quantize(*W4, data="empty.jsonl"), "it has no row"),
    (quantize(*W4, data="sheet.xlsx"), "'.xlsx' are not read"),
    (quantize(*W4, data="a_folder"), "no `save_to_disk` wrote"),
    (quantize(*W4, data="data.jsonl:0"), "must be positive"),
    (quantize(*W4, data="nobody/nothing"), "nobody/nothing cannot be read"),
    (["quantize", "a_folder", "out", *W4], "holds no config.json"),
    (["plan", MODEL, "--scheme", "int4"], "'int4' is not a scheme"),
    (["plan", MODEL, "--tp", "0"], "tp must be at least 1"),
    (["verify", MODEL, "--target", "x"], "target must be one of"),
    (["convert", MODEL, "out", "--to", "foo"], "unknown format 'foo'"),
    (["sample", MODEL, "set.jsonl", "--num-sequences", "0"], "num_sequences must be at least 1"),
    (["plan", MODEL, "--probe"], "--probe needs --dataset"),
    (["report", "a_folder"], "neither moeq_run.json nor config.json"),
    (["report", "nowhere"], "nowhere is not there"),
    (
        ["report", MODEL, "--out", "p.html", "--evaluation", "bad.yaml"],
        "not a record of `moeq eval",
    ),
    (
        ["eval", MODEL, MODEL, "--text", "data.jsonl", "--device-map", "no"],
        "--device-map: expected",
    ),
    (["quantize", "bare", "out", *W4, "--dataset", "data.jsonl"], "bare has no tokenizer"),
    (["quantize", MODEL], "missing argument"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG, ids=[" ".join(a[2:6]) for a, _ in WRONG])
def test_it_is_a_line_and_exit_code_2(arguments, said, here):
    before = sorted(path.name for path in here.iterdir())
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if not line.startswith("calibrating on ")]
    assert said in lines[0]
    program = "" if "see `" in lines[0] else "moeq "  # of a test it is nameless
    assert f"{program}{arguments[0]}: " in lines[0]
    assert len(lines) <= 2
    assert "pydantic" not in done.output and "Traceback" not in done.output
    assert done.stdout == ""
    assert sorted(path.name for path in here.iterdir()) == before


def test_a_run_that_starved_says_so(here):
    done = CliRunner().invoke(app, quantize(*W4))
    assert done.exit_code == 1, done.output
    assert "208 of 208 linears (100.0 %) rest on tokens of others or on too few" in done.stderr
    assert "not a checkpoint to ship" in done.stderr
    assert (here / "out" / "model.safetensors").exists()


def test_words_that_answer_before_the_imports_are_the_modifiers():
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    from moeq_plugin.checkpoint.presets import HOST_NAMES
    from moeq_plugin.cli.fields import PRESETS, TARGETS
    from moeq_plugin.integrations.llm_compressor.solver_fields import Preset
    from moeq_plugin.models.scheme_units import Target

    assert set(PRESET_SCHEMES) == HOST_NAMES
    assert set(PRESETS) == set(Preset)
    assert set(TARGETS) == set(Target)


@pytest.mark.parametrize(
    "wrong", [("--preset", "bst"), ("--target", "foo"), ("--scheme", "W5.5A16")]
)
def test_wrong_words_answer_before_the_imports(wrong, here):
    code = "import sys; from moeq_plugin.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print({'torch', 'transformers', 'llmcompressor'} & sys.modules.keys())"
    arguments = quantize(*(W4 if wrong[0] != "--scheme" else ()), *wrong)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout == "set()\n"
    assert wrong[1] in done.stderr
