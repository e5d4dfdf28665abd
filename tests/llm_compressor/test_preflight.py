"""Wrong requests fail before calibration and say what was expected, what came and what to do."""

import gc
import json
import os
import stat

import pytest
import torch
from helpers import dataset, int4, oneshot, tiny_model

pytest.importorskip("llmcompressor")

from datasets import Dataset
from llmcompressor.modeling.moe.context import get_calibrate_all_experts_flag

from moeq_plugin import MoEQuantModifier


@pytest.fixture
def model(tmp_path):
    return tiny_model("qwen3_moe", tmp_path / "model")


def refuses(message, model, *arguments, **keywords):
    """Assert the error and that no weight has moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        oneshot(model, *arguments, **keywords)
    after = dict(model.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in before.items() if name in after)


def test_unknown_scheme():
    with pytest.raises(ValueError, match=r"'W4A17' is not a scheme; did you mean W4A16 or "):
        MoEQuantModifier(scheme="W4A17")


def test_unknown_argument():
    with pytest.raises(ValueError, match="afinity_power"):
        MoEQuantModifier(scheme="W4A16", afinity_power=1)


@pytest.mark.parametrize(
    "wrong", [{"affinity_power": -1}, {"min_effective_tokens": -1}, {"shrinkage": -0.5}], ids=str
)
def test_out_of_range(wrong):
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        MoEQuantModifier(scheme="W4A16", **wrong)


def test_a_target_that_matches_nothing_lists_near_misses(model):
    groups = int4(16)
    groups["group_0"]["targets"] = ["Linaer", "model.layers.0.self_attn.qproj"]
    message = r"(?s)'Linaer', did you mean \['Linear'.*self_attn.q_proj"
    refuses(message, model, MoEQuantModifier(config_groups=groups))


@pytest.mark.parametrize("group_size", [48, 128])  # 48 is wider than the down projections
def test_group_sizes_that_do_not_divide_are_named_and_counted(group_size, model):
    message = rf"(?s)experts.0.down_proj \(columns=32, group_size={group_size}.*and 22 more"
    refuses(message, model, MoEQuantModifier(config_groups=int4(group_size)))


def test_empty_data(model):
    from torch.utils.data import DataLoader

    data = DataLoader(Dataset.from_dict({"input_ids": []}))
    refuses("data set is empty", model, MoEQuantModifier(config_groups=int4(16)), data)


def test_a_model_that_is_quantized_already(model):
    oneshot(model, MoEQuantModifier(config_groups=int4(16)))
    message = r"32 of 32 targeted modules are quantized already.*Load the 16-bit checkpoint"
    refuses(message, model, MoEQuantModifier(config_groups=int4(16)))


def test_an_output_directory_with_files(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("months of training")
    recipe = MoEQuantModifier(config_groups=int4(16))
    refuses("is not empty; nothing was written", model, recipe, output_dir=str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").read_text() == "months of training"


def test_an_output_directory_that_is_a_file(model, tmp_path):
    (tmp_path / "out").write_text("")
    recipe = MoEQuantModifier(config_groups=int4(16))
    refuses("is not a writable directory", model, recipe, output_dir=str(tmp_path / "out" / "new"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_directory_without_permission(model, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    recipe = MoEQuantModifier(config_groups=int4(16))
    refuses("is not a writable directory", model, recipe, output_dir=str(tmp_path / "new"))


def test_nan_activations_stop_at_the_layer_and_save_nothing(model, tmp_path):
    with torch.no_grad():  # a weight that is a number, and overflows where it is used
        model.model.layers[1].input_layernorm.weight[:] = torch.finfo(torch.float32).max

    with pytest.raises(ValueError, match=r"inputs of model.layers.1.self_attn.q_proj, .*NaN"):
        oneshot(model, MoEQuantModifier(config_groups=int4(16)), output_dir=str(tmp_path / "out"))

    assert not (tmp_path / "out").exists()
    gc.collect()  # what an error leaves behind must not touch the host's settings later
    assert get_calibrate_all_experts_flag() is False


def test_llama4_is_refused(tmp_path):
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    from moeq_plugin.models.moe import UnsupportedModelError, find_moe_layers

    config = Llama4TextConfig(
        hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_local_experts=2,
        vocab_size=32, pad_token_id=0,
    )  # fmt: skip
    from llmcompressor.modeling.moe.linear_experts import LinearExperts2D

    model = Llama4ForCausalLM(config)
    assert LinearExperts2D.get_registration(type(model.model.layers[0].feed_forward.experts))
    with pytest.raises(UnsupportedModelError, match="GPTQModifier"):
        find_moe_layers(model)


def test_a_dense_model_works_and_says_so(tmp_path):
    from loguru import logger
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    said = []
    sink = logger.add(said.append, format="{message}")

    oneshot(model, MoEQuantModifier(config_groups=int4(16)), dataset(2, 16))

    logger.remove(sink)
    assert any("this model has no expert layers" in line for line in said)
    assert any("quantized 7 of 7 linears" in line for line in said)


def test_the_record_is_json_that_anybody_can_read(model, tmp_path):
    oneshot(model, MoEQuantModifier(config_groups=int4(16)), output_dir=str(tmp_path / "out"))
    content = json.loads((tmp_path / "out" / "moeq_run.json").read_text())
    assert content["schema_version"] == 1
