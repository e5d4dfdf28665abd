"""Mappings are found by structure, tried on the modules, and left out with a reason."""

import types

import pytest
import torch
from helpers import FAMILIES, tiny_model

pytest.importorskip("llmcompressor")

from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import nn

from moeq_plugin.integrations.llm_compressor.awq.mappings import find_mappings
from moeq_plugin.models.moe import UnsupportedModelError, find_moe_layers


def linearized(family, directory, **changes):
    model = tiny_model(family, directory, num_hidden_layers=2, **changes)
    linearize_moe(model)
    return model


def found_in(model):
    return find_mappings(model, find_moe_layers(model))


def feeds(found, smooth_name):
    (mapping,) = (m for m in found.resolved if m.smooth_name == smooth_name)
    return set(mapping.balance_names)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_reads_a_norm_is_balanced_and_no_weight_changes(family, tmp_path):
    model = linearized(family, tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    found = found_in(model)

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    (*_, layer) = find_moe_layers(model)
    readers = {
        f"{layer.name}.{name}"
        for name, module in layer.block.named_modules()
        if name and isinstance(getattr(module, "weight", None), nn.Parameter)
        and not name.endswith("down_proj")
    }  # fmt: skip
    assert feeds(found, "model.layers.1.post_attention_layernorm") == readers
    attention = feeds(found, "model.layers.1.input_layernorm")
    first = ["q_a_proj", "kv_a_proj_with_mqa"] if "deepseek" in family else ["q_proj", "k_proj",
                                                                             "v_proj"]  # fmt: skip
    assert attention == {f"model.layers.1.self_attn.{name}" for name in first}
    assert len({m.smooth_name for m in found.resolved}) == len(found.resolved)
    assert not {m.smooth_name for m in found.resolved} & set(found.left_out)


def test_deepseeks_inner_norms_and_its_dense_layer_are_mapped(tmp_path):
    found = found_in(linearized("deepseek_v3", tmp_path))
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert feeds(found, f"{attention}.q_a_layernorm") == {f"{attention}.q_b_proj"}
    assert feeds(found, f"{attention}.kv_a_layernorm") == {f"{attention}.kv_b_proj"}
    assert feeds(found, f"{mlp}.up_proj") == {f"{mlp}.down_proj"}
    assert "in turns" in found.left_out[f"{attention}.kv_b_proj -> o_proj"]


def test_queries_without_compression_read_the_norm_themselves(tmp_path):
    found = found_in(linearized("deepseek_v2", tmp_path, q_lora_rank=None))
    name = "model.layers.0.self_attn"
    assert feeds(found, "model.layers.0.input_layernorm") == {
        f"{name}.q_proj", f"{name}.kv_a_proj_with_mqa",
    }  # fmt: skip


def forward_of(module, function):
    module.forward = types.MethodType(function, module)


class TestLeavesOut:
    """What would change the model, planted into one that is fine."""

    def test_a_norm_whose_weight_is_an_offset(self, tmp_path):
        model = linearized("qwen3_moe", tmp_path)
        norm = model.model.layers[0].input_layernorm
        original = norm.forward
        forward_of(norm, lambda self, x: original(x) + original(x) / self.weight)

        assert "not proportional" in found_in(model).left_out["model.layers.0.input_layernorm"]

    def test_a_block_with_another_reader(self, tmp_path):
        model = linearized("qwen3_moe", tmp_path)
        block = model.model.layers[0].mlp
        original = block.forward
        forward_of(block, lambda _self, x: original(x) + 1e-3 * x)

        name = "model.layers.0.post_attention_layernorm"
        assert "does more to its input than multiply" in found_in(model).left_out[name]

    def test_attention_with_another_reader(self, tmp_path):
        model = linearized("qwen3_moe", tmp_path)
        model.model.layers[0].self_attn.indexer = nn.Sequential(nn.Linear(64, 4))
        reason = found_in(model).left_out["model.layers.0.input_layernorm"]
        assert reason == "model.layers.0.self_attn.indexer may read it too"

    def test_widths_that_do_not_fit(self, tmp_path):
        model = linearized("qwen3_moe", tmp_path)
        model.model.layers[0].self_attn.late_proj = nn.Linear(16, 4)
        assert "widths" in found_in(model).left_out["model.layers.0.input_layernorm"]

    @pytest.mark.parametrize("limit", [1.0, 300.0], ids=["near", "far"])
    def test_experts_that_clamp(self, limit, tmp_path):
        model = linearized("mixtral", tmp_path)
        layer = find_moe_layers(model)[0]
        for index in range(layer.num_experts):
            expert = layer.expert(index)
            original = expert.up_proj.forward
            expert.up_proj.forward = lambda x, f=original: f(x).clamp(-limit, limit)

        found = found_in(model)

        for index in range(layer.num_experts):
            name = f"{layer.name}.experts.{index}.up_proj"
            assert "does not commute with scaling" in found.left_out[name]

    def test_gpt_oss_experts_for_their_offset(self, tmp_path):
        found = found_in(linearized("gpt_oss", tmp_path))
        assert sum("does not commute" in reason for reason in found.left_out.values()) == 2 * 4


def test_a_norm_with_a_bias_is_scaled_with_it(tmp_path):
    model = linearized("qwen3_moe", tmp_path)
    norm = nn.LayerNorm(64)
    nn.init.normal_(norm.bias)
    model.model.layers[0].input_layernorm = norm
    assert feeds(found_in(model), "model.layers.0.input_layernorm")


def test_refuses_decoder_layers_of_unknown_build(tmp_path):
    model = linearized("qwen3_moe", tmp_path)
    model.model.layers[1].pre_feedforward_layernorm = nn.LayerNorm(64)
    with pytest.raises(
        UnsupportedModelError, match=r"model.layers.1 .*pre_feedforward_layernorm; expected"
    ):
        found_in(model)
