"""Models that see are quantized whole: text as asked, towers as they were; others are refused."""

import json

import pytest
from multi_modal import MULTI_MODAL, save_multi_modal

pytest.importorskip("llmcompressor")

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from moeq_plugin.checkpoint.open_checkpoint import open_checkpoint
from moeq_plugin.checkpoint.plan import plan_quantization
from moeq_plugin.checkpoint.presets import scheme_named
from moeq_plugin.cli import app
from moeq_plugin.cli.built import build
from moeq_plugin.integrations.llm_compressor import load_dequantized
from moeq_plugin.models.auto_class import auto_class_of
from moeq_plugin.records.run import RunRecord

SCHEME = "W4A16_G32"


def command(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def save_tokenizer(path):
    words = {str(i): i for i in range(128)}
    splitting = Tokenizer(models.WordLevel(words, "0"))
    splitting.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=splitting)
    made.model_max_length = 64
    made.save_pretrained(path)


def write_data(path):
    rows = [{"input_ids": [(7 * i + j) % 100 for j in range(32)]} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module", params=MULTI_MODAL)
def made(request, tmp_path_factory):
    """Return the model and a directory with it, its checkpoint and what the command said."""
    path = tmp_path_factory.mktemp(request.param)
    model = save_multi_modal(request.param, path / "model")
    save_tokenizer(path / "model")
    (path / "model" / "preprocessor_config.json").write_text('{"patch_size": 4}')
    write_data(path / "data.jsonl")
    data = ("--dataset", path / "data.jsonl")
    done = command("quantize", path / "model", path / "out", "--scheme", SCHEME, *data)
    assert done.exit_code == 0, done.output
    return model, path


def test_towers_are_written_bit_by_bit_and_named_with_the_reason(made):
    model, path = made
    written = load_file(path / "out" / "model.safetensors")
    towers = {name: t for name, t in model.state_dict().items() if ".visual." in name}
    assert towers
    assert all(torch.equal(written[name], tensor) for name, tensor in towers.items())
    kept = RunRecord.load(path / "out")[0].kept
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    seen = {name for name in linears if ".visual." in name}
    assert seen == {name for name, reason in kept.items() if reason == "tower or projector"}
    source = json.loads((path / "model" / "config.json").read_text())
    config = json.loads((path / "out" / "config.json").read_text())
    assert config["architectures"] == source["architectures"]
    assert (path / "out" / "preprocessor_config.json").read_text() == '{"patch_size": 4}'


def test_what_is_planned_is_what_is_written(made):
    _, path = made
    plan = plan_quantization(path / "model", scheme_named(SCHEME), build=build)
    tensors = open_checkpoint(path / "out").tensors
    quantized = {name.removesuffix(".weight_packed") for name in tensors if "_packed" in name}
    assert set(plan.quantized) == quantized
    assert plan.tensor_bytes == sum(tensor.num_bytes for tensor in tensors.values())
    assert plan.file_bytes == (path / "out" / "model.safetensors").stat().st_size


def test_it_is_sound_and_read_exactly(made):
    model, path = made
    done = command("verify", path / "out", "--source", path / "model")
    assert done.exit_code == 0, done.output
    read = load_dequantized(path / "out")
    assert type(read) is type(model)
    for name, tensor in model.state_dict().items():
        if ".visual." in name or "norm" in name:
            assert torch.equal(read.state_dict()[name], tensor), name
    # a weight of the text is within half a step of the grid, or so, and not another's
    layer = "model.language_model.layers.1"
    experts = model.get_submodule(f"{layer}.mlp.experts")
    down = read.get_submodule(f"{layer}.mlp.experts.2.down_proj").weight
    error = (down - experts.down_proj[2]).norm() / down.norm()
    assert 0 < error < 0.3


def test_what_plain_transformers_loses_of_it_is_said(made):
    model, path = made
    config = AutoConfig.from_pretrained(path / "out")
    loader = auto_class_of(config)
    _, info = loader.from_pretrained(path / "out", output_loading_info=True)
    is_lost = any("experts" in key for key in info["missing_keys"])
    assert is_lost == (config.model_type == "qwen3_vl_moe")
    limits = RunRecord.load(path / "out")[0].limits
    assert is_lost == any(f"{loader.__name__}.from_pretrained" in limit for limit in limits)
    assert not any("AutoModelForCausalLM" in limit for limit in limits)
    said = command("verify", path / "out", "--target", "transformers")
    assert said.exit_code == is_lost
    assert ("transformers: yes" in command("inspect", path / "out").output) != is_lost


def test_a_command_that_reads_it_computes_with_all_of_it(made, tmp_path):
    _, path = made
    (tmp_path / "text").write_text(" ".join(str(i % 100) for i in range(200)))
    words = ("--text", tmp_path / "text", "--seq-len", "16", "--num-sequences", "4")
    done = command("eval", path / "model", path / "out", *words)
    assert done.exit_code == 0, done.output


def test_models_of_another_kind_are_refused_by_all_in_one_sentence(tmp_path):
    config = AutoConfig.for_model(
        "switch_transformers", vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=2,
        num_decoder_layers=2, num_heads=4, num_experts=4,
    )  # fmt: skip
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    write_data(tmp_path / "data.jsonl")
    data = ("--dataset", tmp_path / "data.jsonl")
    done = command("quantize", tmp_path / "model", tmp_path / "out", "--scheme", SCHEME, *data)
    assert done.exit_code == 2
    reason = done.stderr.strip().splitlines()[-1].removeprefix("moeq quantize: ")
    assert "SwitchTransformersForConditionalGeneration" in reason
    assert {p.name for p in tmp_path.iterdir()} == {"model", "data.jsonl"}
    planned = command("plan", tmp_path / "model", "--scheme", SCHEME)
    assert (planned.exit_code, planned.stderr.strip()) == (2, f"moeq plan: {reason}")
    inspected = command("inspect", tmp_path / "model")
    assert (inspected.exit_code, f"quantize: {reason}" in inspected.output) == (0, True)
