"""The commands: what they print, and how they end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import copy_of, edited_tensors
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from moeq_plugin.checkpoint.plan import plan_quantization
from moeq_plugin.checkpoint.presets import scheme_named
from moeq_plugin.cli import app

runner = CliRunner()
TINY = Path(__file__).parents[2] / "examples" / "assets" / "tiny_moe"


def test_verify_ends_with_0_for_a_sound_checkpoint(sound):
    done = runner.invoke(app, ["verify", str(sound("mixtral"))])
    assert done.exit_code == 0, done.output
    assert "0 errors, 0 warnings for vllm, tp 1" in done.output


def test_verify_ends_with_1_and_a_way_out(sound):
    done = runner.invoke(app, ["verify", str(sound("mixed")), "--target", "transformers"])
    assert done.exit_code == 1, done.output
    assert "one scheme is applied to all experts of the model" in done.output
    assert "way out: serve it with vLLM, or read it with moeq_plugin" in done.output


def test_verify_prints_json(sound):
    path = sound("mixtral")
    done = runner.invoke(
        app, ["verify", str(path), "--source", str(path.parent / "model"), "--json"]
    )
    report = json.loads(done.stdout)
    assert (report["family"], report["exit_code"], report["findings"]) == ("mixtral", 0, [])
    assert report["schemes"] == {"W4 symmetric group 16": 32, "16 bit": 3}


def test_verify_shows_some_findings_and_counts_the_others(sound, tmp_path):
    path = copy_of(sound("qwen3_moe"), tmp_path / "out")
    with edited_tensors(path) as tensors:
        for name in [name for name in tensors if name.endswith("norm.weight")]:
            del tensors[name]
    done = runner.invoke(app, ["verify", str(path)])
    assert done.exit_code == 1
    assert done.output.count("error: ") == 5
    assert "and 4 more [missing-tensor]" in done.output
    assert "9 errors" in done.output


def test_a_plan_for_programs_is_what_is_planned():
    plan = plan_quantization(TINY, scheme_named("W4A16_G64"), tp=2)
    done = runner.invoke(app, ["plan", str(TINY), "--scheme", "W4A16_G64", "--tp", "2", "--json"])
    found = json.loads(done.stdout)
    assert (found["family"], found["num_experts"], found["probe"]) == ("qwen3_moe", 16, None)
    assert found["quantized"] == list(plan.quantized)
    assert found["kept"] == plan.kept
    assert (found["tensor_bytes"], found["file_bytes"]) == (plan.tensor_bytes, plan.file_bytes)
    assert [of["what"] for of in found["warnings"]] == [of.what for of in plan.warnings]


@pytest.fixture
def generating(sound, tmp_path):
    path = copy_of(sound("olmoe"), tmp_path / "out")
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(128)}, "0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def test_verify_generates(generating):
    done = runner.invoke(app, ["verify", str(generating), "--generate", "7"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("7")
    assert done.stderr == ""  # no bar of a library either


def test_generate_prints_the_text_and_nothing_else():
    done = runner.invoke(app, ["generate", str(TINY), "def main", "--max-new-tokens", "2"])
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    assert done.stdout.startswith("def main")


def test_verify_does_not_generate_from_what_is_unsound(generating):
    with edited_tensors(generating) as tensors:
        del tensors["model.norm.weight"]
    done = runner.invoke(app, ["verify", str(generating), "--generate", "7"])
    assert done.exit_code == 1
    assert done.output.startswith("error: ")


def test_inspect_describes_a_checkpoint(sound):
    done = runner.invoke(app, ["inspect", str(sound("mixed"))])
    assert done.exit_code == 0, done.output
    assert "2 of 2 layers with 4 experts, 2 per token, 0 shared; experts separate" in done.output
    assert "layer 1: 4 x 16 bit, 12 x W8 symmetric channel" in done.output
    assert "transformers: routed experts: one scheme is applied" in done.output
    assert "vllm: yes" in done.output


def test_inspect_needs_no_more_than_a_config(sound):
    config = sound("qwen2_moe") / "config.json"
    done = runner.invoke(app, ["inspect", str(config), "--json"])
    found = json.loads(done.stdout)
    assert found["layers"]["0"] == {"W4 symmetric group 16": 19}
    assert (found["num_experts"], found["top_k"], found["num_shared"]) == (4, 2, 1)


def test_inspect_counts_parameters(sound):
    from safetensors.torch import load_file

    path = sound("deepseek_v3").parent / "model"
    done = runner.invoke(app, ["inspect", str(path), "--json"])
    tensors = load_file(path / "model.safetensors").values()
    assert json.loads(done.stdout)["num_parameters"] == sum(t.numel() for t in tensors)


def test_inspect_says_that_experts_are_fused(sound):
    done = runner.invoke(app, ["inspect", str(sound("gpt_oss").parent / "model")])
    assert "experts fused" in done.output


def test_plan_reads_headers():
    done = runner.invoke(app, ["plan", str(TINY), "--tp", "2"])
    assert done.exit_code == 0, done.output
    assert "qwen3_moe: 4 layers, 4 with 16 experts, 2 per token, 0 shared" in done.output
    assert "208 linears, 92.5% of all parameters, to W4 symmetric group 128" in done.output
    assert "7228160 bytes of tensors become 2270208, a file of 2344400 bytes" in done.output
    assert "warning: model.layers.*.mlp.experts.*.down_proj: groups of 128" in done.output


def test_plan_says_what_quantization_would_refuse(sound):
    done = runner.invoke(app, ["plan", str(sound("qwen3_moe").parent / "model")])
    assert "groups of 128 do not divide the columns of 32 linears" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "no"], "no is not there"),
        (["verify", str(TINY), "--tp", "0"], "tp must be at least 1"),
        (["verify", str(TINY), "--source", "no"], "no is not there"),
        (["inspect", "no"], "no is not there"),
        (["plan", "no"], "no is not there"),
        (["plan", str(TINY), "--scheme", "W4A17"], "is not a scheme"),
        (["plan", str(TINY), "--bits-per-weight", "3"], "need --sensitivity"),
    ],
    ids=lambda value: " ".join(Path(v).name for v in value) if isinstance(value, list) else "",
)
def test_a_wrong_request_is_a_message_and_exit_code_2(arguments, message):
    done = runner.invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert "Traceback" not in done.output


def test_nothing_loads_a_framework_to_read_headers(sound):
    code = (
        "import sys; from moeq_plugin.cli import app; from typer.testing import CliRunner\n"
        "for command in (['plan', sys.argv[1]], ['inspect', sys.argv[1]]):\n"
        "    assert CliRunner().invoke(app, command).exit_code == 0\n"
        "assert not {'torch', 'transformers', 'llmcompressor'} & set(sys.modules)"
    )
    model = sound("mixtral").parent / "model"
    subprocess.run([sys.executable, "-c", code, str(model)], check=True)
