"""Linears that llama.cpp's converter splits or reorders have the rows of what it writes."""

import numpy as np
import pytest
import torch

pytest.importorskip("llmcompressor")
pytest.importorskip("gguf")

from helpers import dataset, oneshot, tiny_model
from torch import nn
from transformers import AutoConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet

from moeq_plugin.integrations.llama_cpp.conversion import conversion_of, with_parts
from moeq_plugin.integrations.llama_cpp.modifier import ImportanceModifier
from moeq_plugin.integrations.llama_cpp.tensor_names import tensor_names


@pytest.mark.parametrize("rank", [32, None])
def test_keys_are_multiplied_with_queries_and_values_with_the_latent(rank, tmp_path):
    changes = {"q_lora_rank": rank, "qk_nope_head_dim": 24, "v_head_dim": 20}
    modifier = ImportanceModifier()
    oneshot(tiny_model("deepseek_v3", tmp_path, **changes), modifier)
    model = tiny_model("deepseek_v3", tmp_path / "again", **changes)
    attention, queries, latents = model.model.layers[1].self_attn, [], []
    makes = attention.q_proj if rank is None else attention.q_b_proj
    makes.register_forward_hook(lambda _m, _args, out: queries.append(out.detach()))
    attention.kv_b_proj.register_forward_pre_hook(lambda _m, args: latents.append(args[0]))
    for row in dataset()["input_ids"]:
        model(torch.tensor([row]))
    # what does not rotate comes first: head by head, 24 of 24 + 16
    heads = torch.cat([x.flatten(0, -2) for x in queries]).double()
    heads = heads.unflatten(1, (4, 40))[..., :24]
    found = modifier.matrix.tensors
    keys = found["blk.1.attn_k_b.weight"]
    np.testing.assert_allclose(keys.mean_squares, heads.square().mean(0), rtol=1e-3)
    values = found["blk.1.attn_v_b.weight"]
    latent = torch.cat([x.flatten(0, -2) for x in latents]).detach().double().square().mean(0)
    np.testing.assert_allclose(values.mean_squares, latent.expand(4, -1), rtol=1e-3)
    assert (keys.counts == values.counts).all() and len(keys.counts) == 4
    assert "blk.1.attn_kv_b.weight" not in found


def linear_attention(**changes):
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_value_head_dim": 4}
    config = AutoConfig.for_model("qwen3_5_moe_text", hidden_size=16, **{**sizes, **changes})
    model, layer = nn.Module(), nn.Module()
    model.layer, layer.linear_attn = layer, Qwen3_5MoeGatedDeltaNet(config, 0)
    return model, {layer.linear_attn.out_proj: "layer.linear_attn.out_proj"}


def test_heads_that_share_a_key_go_round_after_round():
    model, names = linear_attention()
    conversion = conversion_of(model, names, {"layer.linear_attn.out_proj": "blk.0.ssm_out.weight"})
    order = conversion.orders["layer.linear_attn.out_proj"].tolist()
    # head 3 * key + i of transformers is head 2 * i + key of llama.cpp
    for key in range(2):
        for shared in range(3):
            for column in range(4):
                there = 4 * (2 * shared + key) + column
                assert order[there] == 4 * (3 * key + shared) + column


def test_where_every_key_has_one_head_nothing_moves():
    model, names = linear_attention(linear_num_value_heads=2)
    conversion = conversion_of(model, names, {"layer.linear_attn.out_proj": "blk.0.ssm_out.weight"})
    assert conversion.orders["layer.linear_attn.out_proj"].tolist() == [*range(8)]


def test_parts_of_a_linear_have_types_too():
    latent = "model.layers.3.self_attn.kv_b_proj"
    names = {
        **tensor_names([latent, "model.layers.3.mlp.experts.0.up_proj"], "deepseek_v3"),
        "model.layers.1.linear_attn.in_proj_qkvz": "blk.1.ssm_in.weight",
    }
    assert names[latent] == "blk.3.attn_v_b.weight"
    types = dict.fromkeys(names.values(), "IQ2_S")
    assert with_parts(types, names) == {
        **types,
        "blk.3.attn_k_b.weight": "Q8_0",  # its columns are those of a head, and no 256
        "blk.1.attn_qkv.weight": "IQ2_S",
        "blk.1.attn_gate.weight": "IQ2_S",
    }
