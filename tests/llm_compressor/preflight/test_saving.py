"""What could not be saved, or read by anybody, is refused before it is calibrated."""

import json

import pytest
import torch
from helpers import dataset, int4, logits, oneshot, tiny_model

pytest.importorskip("llmcompressor")

from transformers import AutoModelForCausalLM

from moeq_plugin import MoEQuantModifier
from moeq_plugin.integrations.llm_compressor import load_dequantized


def recipe(**more):
    return MoEQuantModifier(config_groups=int4(16), **more)


@pytest.fixture
def model(tmp_path):
    return tiny_model("qwen3_moe", tmp_path / "model")


def test_generation_settings_that_transformers_does_not_write(model, tmp_path):
    settings = {"do_sample": False, "temperature": 0.000001}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    modifier = recipe(work_dir=str(tmp_path / "work"))
    with pytest.raises(ValueError, match=r"cannot be saved.*do_sample = True.*temperature"):
        oneshot(loaded, modifier, output_dir=str(tmp_path / "out"))
    assert {p.name for p in tmp_path.iterdir()} == {"model"}
    loaded.generation_config.do_sample = True
    oneshot(loaded, modifier, output_dir=str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["do_sample"]


def test_saving_uncompressed(model, tmp_path):
    with pytest.raises(ValueError, match="neither vLLM nor transformers reads"):
        oneshot(model, recipe(), output_dir=str(tmp_path / "out"), save_compressed=False)
    oneshot(model, recipe())
    with pytest.raises(ValueError, match="neither vLLM nor transformers reads"):
        model.save_pretrained(tmp_path / "out", save_compressed=False)
    assert not (tmp_path / "out").exists()


def test_an_upload_before_the_files_are_there(model, tmp_path):
    oneshot(model, recipe())
    with pytest.raises(ValueError, match=r"push_to_hub=True uploads before.*upload_folder"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()


def test_experts_in_16_bit_beside_quantized_attention_are_lost_to_transformers(model, tmp_path):
    modifier = recipe(ignore=["lm_head", "re:.*experts.*"])
    oneshot(model, modifier, output_dir=str(tmp_path / "out"))
    (limit,) = modifier.record.limits
    assert "the experts stay in 16 bit" in limit
    assert limit in (tmp_path / "out" / "README.md").read_text()
    # the limit is true, and its way out leads out
    assert torch.equal(logits(load_dequantized(tmp_path / "out")), logits(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.allclose(logits(plain), logits(model), atol=1e-2)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_layer_that_stays_in_16_bit_is_read_bit_by_bit(family, tmp_path):
    model = tiny_model(family, tmp_path / "model")
    oneshot(
        model, recipe(ignore=["lm_head", r"re:.*layers\.1\..*"]), output_dir=str(tmp_path / "out")
    )
    assert torch.equal(logits(load_dequantized(tmp_path / "out")), logits(model))


def test_quantized_embeddings_are_read_bit_by_bit(model, tmp_path):
    groups = int4(16)
    groups["group_0"]["targets"] = ["Linear", "Embedding"]
    oneshot(model, MoEQuantModifier(config_groups=groups), output_dir=str(tmp_path / "out"))
    assert torch.equal(logits(load_dequantized(tmp_path / "out")), logits(model))


@pytest.mark.parametrize(("part", "named"), [("q_proj", True), ("o_proj", False)])
def test_parts_of_one_matrix_in_two_schemes_are_named(part, named, model):
    groups = int4(16)
    groups["group_1"] = int4(16, num_bits=8)["group_0"] | {"targets": [f"re:.*{part}"]}
    modifier = MoEQuantModifier(config_groups=groups)
    oneshot(model, modifier, dataset(2))
    limits = [limit for limit in modifier.record.limits if "as one matrix" in limit]
    assert len(limits) == named
    if named:
        assert "model.layers.*.self_attn.q_proj" in limits[0] and "in 2 layers" in limits[0]


def test_what_says_how_images_become_inputs_is_copied(model, tmp_path):
    (tmp_path / "model" / "preprocessor_config.json").write_text('{"size": 4}')
    oneshot(model, recipe(), dataset(2), output_dir=str(tmp_path / "out"))
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 4}'
