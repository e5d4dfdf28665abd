"""What MoEQuantAWQModifier cannot do is refused before it calibrates."""

import pytest
from helpers import NoProcessor, dataset, int4, oneshot, tiny_model

pytest.importorskip("llmcompressor")

from awq_smoothing import rounding, smooth
from llmcompressor import oneshot as host
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moeq_plugin import MoEQuantAWQModifier, MoEQuantModifier


def test_refuses_a_dense_model(tmp_path):
    config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, vocab_size=128)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no MoE layers, so there is no router"):
        smooth(model)


def test_refuses_no_calibration_data(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    with pytest.raises(ValueError, match="needs calibration data, got none"):
        host(model=model, recipe=[MoEQuantAWQModifier(), rounding()], processor=NoProcessor())


def test_refuses_a_loss_mask(tmp_path):
    data = dataset().add_column("loss_mask", [[1] * 32] * 8)
    with pytest.raises(ValueError, match="cannot align use_loss_mask"):
        oneshot(
            tiny_model("qwen3_moe", tmp_path),
            [MoEQuantAWQModifier(), rounding()],
            data,
            use_loss_mask=True,
        )


def test_refuses_coming_after_the_quantizer(tmp_path):
    recipe = [rounding(), MoEQuantAWQModifier(), rounding()]  # the host refuses two of them
    with pytest.raises(ValueError, match="put it before the modifier that quantizes"):
        oneshot(tiny_model("qwen3_moe", tmp_path), recipe)


@pytest.mark.parametrize("later", ["router", "allocated"])
def test_refuses_nothing_that_has_a_scheme_yet(later, tmp_path):
    groups = int4(16)
    groups["group_0"]["targets"] = ["lm_head"]
    options = ["W3A16_G16", "W4A16_G16"]
    quantizer = {
        "router": QuantizationModifier(config_groups=groups),
        "allocated": MoEQuantModifier(bits_per_weight=5.5, options=options),
    }[later]
    with pytest.raises(ValueError, match="quantizes nothing that scales could be moved into"):
        oneshot(tiny_model("qwen3_moe", tmp_path), [MoEQuantAWQModifier(), quantizer])


def test_refuses_a_mapping_that_sums_within_an_expert(tmp_path):
    mapping = AWQMapping("re:.*post_attention_layernorm$",
                         ["re:.*experts.0.gate_proj$", "re:.*experts.0.up_proj$"])  # fmt: skip
    with pytest.raises(ValueError, match="tokens count alike that the router weights"):
        smooth(tiny_model("qwen3_moe", tmp_path), mappings=[mapping])
