"""A model that is not finite, not whole or not called as modules is refused before calibration."""

import pytest
import torch
from helpers import int4, oneshot, tiny_model
from torch import nn

pytest.importorskip("llmcompressor")

from llmcompressor.modifiers.quantization import QuantizationModifier

from moeq_plugin import MoEQuantModifier, RWKVQuantModifier
from moeq_plugin.integrations.llm_compressor import (
    MoEQuantAWQModifier,
    ResidualRotationModifier,
)

RECIPES = {
    "moequant": lambda: MoEQuantModifier(config_groups=int4(16)),
    "budget": lambda: MoEQuantModifier(
        bits_per_weight=7.0, options=["W4A16_G16", "W8A16_G16"], sensitivity={"gradient": False}
    ),
    "codebooks": lambda: RWKVQuantModifier(),
    "awq": lambda: [
        MoEQuantAWQModifier(n_grid=3),
        QuantizationModifier(config_groups=int4(16), ignore=["lm_head", "re:.*gate$"]),
    ],
    "rotation": lambda: [
        ResidualRotationModifier(),
        MoEQuantModifier(config_groups=int4(16)),
    ],
}


@pytest.fixture
def model(tmp_path):
    return tiny_model("qwen3_moe", tmp_path / "model")


def unchanged(model, before):
    after = dict(model.named_parameters())
    return all(torch.equal(p.nan_to_num(), after[name].nan_to_num()) for name, p in before.items()
               if name in after)  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_weight_of_one_expert_that_is_no_number(recipe, value, model):
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = value
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"1 weights .*layers\.1\.mlp\.experts\.3\.down_proj\.we"):
        oneshot(model, RECIPES[recipe]())
    assert unchanged(model, before)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
     "model.layers.0.mlp.gate.weight", "model.layers.1.self_attn.q_norm.weight"],
)  # fmt: skip
def test_every_kind_of_weight_is_looked_at(name, model):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = float("nan")
    with pytest.raises(ValueError, match=f"NaN or infinity, nothing was quantized: {name}"):
        oneshot(model, RECIPES["moequant"]())


class Adapted(nn.Module):
    """Laid out as PEFT lays out a LoRA of a linear."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer = linear
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, linear.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_an_adapter_beside_the_weights(model):
    attention = model.model.layers[0].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    with pytest.raises(ValueError, match=r"merge the adapter first.*merge_and_unload"):
        oneshot(model, RECIPES["moequant"]())


@pytest.mark.parametrize("target", ["ExpertMLPWithGate", "re:.*experts.0$", "LinearExperts2D"])
def test_sequential_targets_in_experts(target, model):
    message = "sequential_targets .* Qwen3MoeDecoderLayer, Qwen3MoeSparseMoeBlock, or leave"
    with pytest.raises(ValueError, match=message):
        oneshot(model, RECIPES["moequant"](), sequential_targets=["Qwen3MoeAttention", target])


def test_sequential_targets_that_are_offered_give_the_same_weights(model, tmp_path):
    oneshot(model, RECIPES["moequant"]())
    for targets in (["Qwen3MoeDecoderLayer"], ["Qwen3MoeAttention", "Qwen3MoeSparseMoeBlock"]):
        other = tiny_model("qwen3_moe", tmp_path / "model")
        modifier = RECIPES["moequant"]()
        oneshot(other, modifier, sequential_targets=targets)
        assert len(modifier.record.linears) == 32
        if len(targets) == 1:
            theirs = dict(model.named_parameters())
            assert all(torch.equal(p, theirs[name]) for name, p in other.named_parameters())


def test_a_group_size_that_does_not_divide_is_not_bypassed(model):
    recipe = MoEQuantModifier(config_groups=int4(48), bypass_divisibility_checks=True)
    with pytest.raises(ValueError, match="bypass_divisibility_checks has no effect here"):
        oneshot(model, recipe)
    oneshot(model, RECIPES["moequant"]())  # nothing is left attached


@pytest.mark.parametrize("order", ["group", "dynamic", True])
def test_an_order_that_nobody_reads_any_more(order):
    with pytest.raises(ValueError, match="has been removed from compressed-tensors: use 'static'"):
        MoEQuantModifier(config_groups=int4(16), actorder=order)


@pytest.mark.parametrize("order", ["static", "weight", None])
def test_orders_that_are_read(order):
    MoEQuantModifier(config_groups=int4(16), actorder=order)
