import pytest
import torch
from helpers import tiny_model

from moeq_plugin.models.moe import find_moe_layers
from moeq_plugin.models.scheme_units import Target, unit_labels

pytest.importorskip("llmcompressor")


def labels_of(family, tmp_path):
    from llmcompressor.modeling.moe.linearize import linearize_moe

    model = tiny_model(family, tmp_path)
    linearize_moe(model)
    modules = dict(model.named_modules())
    names = [n for n, m in modules.items() if type(m) is torch.nn.Linear and "lm_head" not in n]
    units = unit_labels(names, find_moe_layers(model), modules)
    return {t: dict(zip(names, units[t], strict=True)) for t in Target}


def members(of_name, name):
    return {n.rpartition(".")[2] for n, label in of_name.items() if label == of_name[name]}


def test_vllm_reads_one_scheme_for_all_experts_of_a_layer_and_for_fused_projections(tmp_path):
    units = labels_of("qwen2_moe", tmp_path)["vllm"]
    prefix = "model.layers.0."

    experts = {n for n in units if n.startswith(f"{prefix}mlp.experts.")}
    assert len({units[n] for n in experts}) == 1
    assert {n for n in units if units[n] == units[min(experts)]} == experts
    assert members(units, f"{prefix}self_attn.q_proj") == {"q_proj", "k_proj", "v_proj"}
    assert members(units, f"{prefix}self_attn.o_proj") == {"o_proj"}
    assert members(units, f"{prefix}mlp.shared_expert.gate_proj") == {"gate_proj", "up_proj"}
    assert units[f"{prefix}self_attn.o_proj"] != units["model.layers.1.self_attn.o_proj"]


def test_gguf_keeps_one_tensor_per_projection(tmp_path):
    units = labels_of("mixtral", tmp_path)["gguf"]
    of_gate = {n for n, u in units.items() if u == units["model.layers.0.mlp.experts.0.gate_proj"]}

    assert of_gate == {f"model.layers.0.mlp.experts.{e}.gate_proj" for e in range(4)}
    assert units["model.layers.0.self_attn.q_proj"] != units["model.layers.0.self_attn.k_proj"]


def test_an_expert_is_free_but_for_its_gate_and_up(tmp_path):
    units = labels_of("olmoe", tmp_path)["expert"]
    name = "model.layers.1.mlp.experts.2."

    assert members(units, name + "gate_proj") == {"gate_proj", "up_proj"}
    assert members(units, name + "down_proj") == {"down_proj"}


def test_latent_attention_is_fused_where_its_first_projections_are(tmp_path):
    units = labels_of("deepseek_v3", tmp_path)["vllm"]
    name = "model.layers.0.self_attn."

    assert members(units, name + "q_a_proj") == {"q_a_proj", "kv_a_proj_with_mqa"}
    assert members(units, name + "q_b_proj") == {"q_b_proj"}


def test_every_linear_is_its_own_unit_where_they_run_one_by_one(tmp_path):
    units = labels_of("gpt_oss", tmp_path)["linear"]
    assert all(name == label for name, label in units.items())
