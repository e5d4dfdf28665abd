"""What could not be saved, or read by anybody, is refused before it is calibrated."""

import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import dataset, int4, logits, oneshot, tiny_model

pytest.importorskip("llmcompressor")

from huggingface_hub import CommitInfo, HfApi, ModelCard, upload_folder
from huggingface_hub.errors import EntryNotFoundError
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


@pytest.fixture
def hub(monkeypatch):
    """A hub with an empty repository: what is uploaded to it, by name."""
    uploaded = {}

    def create_commit(self, *, operations, **_):
        for new in operations:
            with new.as_file() as file:
                uploaded[new.path_in_repo] = file.read()
        return CommitInfo("https://huggingface.co/us/it/commit/1", "", "", "1")

    def no_card(*_, **__):
        raise EntryNotFoundError("no README.md")

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="us/it"))
    monkeypatch.setattr(ModelCard, "load", no_card)
    monkeypatch.setattr(ModelCard, "validate", lambda *_, **__: None)  # asks the hub as well
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *_, **__: None)
    return uploaded


def test_an_upload_that_would_replace_the_model_card(model, hub, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    plain.push_to_hub("us/it")
    assert b"automatically generated" in hub["README.md"]  # what it makes of a card
    hub.clear()

    oneshot(model, recipe(), output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"push_to_hub replaces the model card.*upload_folder"):
        model.push_to_hub("us/it")
    assert hub == {}
    # what the message says to upload instead holds all of it, and the call takes these arguments
    inspect.signature(upload_folder).bind(repo_id="us/it", folder_path=tmp_path / "out")
    saved = {path.name: path.read_text(errors="replace") for path in (tmp_path / "out").iterdir()}
    assert {"moeq_run.json", "recipe.yaml", "model.safetensors"} <= saved.keys()
    assert "moeq" in saved["README.md"]
    assert "quantization_config" in json.loads(saved["config.json"])


def test_a_model_that_no_run_has_changed_is_uploaded_as_ever(model, hub):
    handle = model.model.layers[0].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        oneshot(model, recipe())
    handle.remove()
    model.push_to_hub("us/it")
    assert {"README.md", "config.json", "model.safetensors"} <= hub.keys()


def stop(*_):
    raise KeyboardInterrupt


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
