"""What is said of a family that we do not know is what quantization then does."""

import json
import os
import subprocess

import pytest
import torch
from command_line import command
from helpers import dataset, oneshot
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

pytest.importorskip("llmcompressor")

from moeq_plugin import MoEQuantModifier
from moeq_plugin.checkpoint.open_checkpoint import open_checkpoint
from moeq_plugin.checkpoint.overview import inspect_model
from moeq_plugin.checkpoint.plan import plan_quantization
from moeq_plugin.checkpoint.presets import scheme_named
from moeq_plugin.cli import app
from moeq_plugin.cli.built import build
from moeq_plugin.core.dense_words import NO_EXPERTS

SCHEME = "W4A16_G32"
TEXT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
UNKNOWN = {
    # experts in input_linear and output_linear of a block_sparse_moe
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True},
    # Mixtral's names under another model type, a router that is a linear
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    # a first layer without experts, keys of its own in the config, float32 among bfloat16
    "ernie4_5_moe": {
        "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 32,
        "tie_word_embeddings": False,
    },
    # 3-dimensional weights that hold no experts
    "granitemoehybrid": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16,
        "mamba_d_state": 16, "mamba_chunk_size": 16, "tie_word_embeddings": False,
    },
}  # fmt: skip


def saved(family, path, dtype=torch.float32):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**TEXT, **UNKNOWN[family]})
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", UNKNOWN)
def test_linears_and_bytes_are_those_of_the_written_file(family, dtype, tmp_path):
    path = saved(family, tmp_path / "model", dtype)
    plan = plan_quantization(path, scheme_named(SCHEME), build=build)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    groups = {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}}
    oneshot(model, MoEQuantModifier(config_groups=groups), dataset(4, 16))
    model.save_pretrained(tmp_path / "out")

    tensors = open_checkpoint(tmp_path / "out").tensors
    assert len(plan.quantized) == sum("_packed" in name for name in tensors)
    assert plan.tensor_bytes == sum(tensor.num_bytes for tensor in tensors.values())
    assert plan.file_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("family", UNKNOWN)
def test_layers_and_experts_are_counted(family, tmp_path):
    path = saved(family, tmp_path / "model")
    found = inspect_model(path, build)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert found.num_moe_layers == (1 if family == "ernie4_5_moe" else 2)
    assert (found.num_experts, found.top_k) == (4, 2)
    assert found.num_parameters == sum(p.numel() for p in {*model.parameters()}) + sum(
        b.numel() for n, b in model.named_buffers() if n in model.state_dict()
    )
    assert (found.is_built, found.refusal) == (True, "")


def test_without_building_it_stacked_experts_are_said_not_to_be_counted(tmp_path):
    found = inspect_model(saved("granitemoe", tmp_path / "model"))
    assert (found.num_moe_layers, found.experts, found.is_built) == (0, "not counted", False)


def test_experts_that_nobody_takes_apart_are_refused_by_all_in_one_sentence(tmp_path):
    config = AutoConfig.for_model(
        "jetmoe", **TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16}
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="would stay in 16 bit") as refused:
        oneshot(model, MoEQuantModifier(scheme="W4A16"), dataset(2, 16))
    with pytest.raises(ValueError, match="would stay in 16 bit") as planned:
        plan_quantization(tmp_path / "model", scheme_named(SCHEME), build=build)
    assert str(planned.value) == str(refused.value)
    assert inspect_model(tmp_path / "model", build).refusal == str(refused.value)


def test_experts_that_text_does_not_reach_are_refused_in_a_sentence(tmp_path):
    text = {
        **TEXT, "moe_intermediate_size": [32, 64], "moe_num_experts": 4, "moe_k": 2,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2],
        },
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    config = AutoConfig.for_model("ernie4_5_vl_moe", text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="experts for images") as planned:
        plan_quantization(tmp_path / "model", scheme_named(SCHEME), build=build)
    assert inspect_model(tmp_path / "model", build).refusal == str(planned.value)


def test_inspect_says_where_it_knows_from(tmp_path):
    path = saved("granitemoe", tmp_path / "model")
    done = CliRunner().invoke(app, ["inspect", str(path)])
    assert "2 of 2 layers with 4 experts, 2 per token, 0 shared; experts fused" in done.output
    assert "built without weights to find out" in done.output
    as_json = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    assert json.loads(as_json.output)["is_built"] is True


def test_a_dense_model_is_said_to_be_for_others_and_nothing_else_is_said(tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TEXT)).save_pretrained(
        tmp_path
    )
    environment = {k: v for k, v in os.environ.items() if k != "LLM_COMPRESSOR_LOG_LEVEL"}
    done = subprocess.run(
        command("inspect", tmp_path), capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.splitlines()[1] == f"2 layers without experts; {NO_EXPERTS}"
    assert "accelerator" not in done.stdout + done.stderr
    planned = CliRunner().invoke(app, ["plan", str(tmp_path), "--scheme", SCHEME])
    assert planned.stdout.startswith(f"llama: 2 layers without experts; {NO_EXPERTS}\n")
