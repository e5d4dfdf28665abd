"""What stays in 16 bit is found in `ignore` by whoever reads names of files or of modules."""

import json

import pytest
import torch
from helpers import dataset, int4, oneshot
from transformers import AutoConfig, AutoModelForCausalLM

pytest.importorskip("llmcompressor")

from moeq_plugin import MoEQuantModifier, verify_checkpoint
from moeq_plugin.integrations.llm_compressor import load_dequantized

TEXT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {"mixtral": {}, "phimoe": {"sliding_window": None}, "granitemoe": {}}


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    """Return the source and the checkpoint of a model whose first layer stays in 16 bit."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **TEXT, **FAMILIES[request.param])
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path / "model")
    model = AutoModelForCausalLM.from_pretrained(path / "model")
    recipe = MoEQuantModifier(config_groups=int4(), ignore=["lm_head", r"re:.*layers\.0\..*"])
    oneshot(model, recipe, dataset())
    model.save_pretrained(path / "out")
    return path / "model", path / "out"


def test_every_linear_in_16_bit_is_listed_as_the_file_and_as_the_model_call_it(made):
    source, out = made
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    from moeq_plugin.checkpoint.open_checkpoint import open_checkpoint

    weights = [
        name.removesuffix(".weight")
        for name, tensor in open_checkpoint(out).tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and "embed" not in name
    ]
    assert set(weights) <= set(ignored)
    modules = {
        name
        for name, module in load_dequantized(out).named_modules()
        if isinstance(module, torch.nn.Linear) and ("layers.0." in name or name == "lm_head")
    }
    assert modules <= set(ignored)
    assert len(ignored) == len(set(ignored))


def test_it_is_sound_and_the_kept_layer_is_read_bit_by_bit(made):
    source, out = made
    errors = [f for f in verify_checkpoint(out, source=source).findings if f.severity == "error"]
    assert errors == []
    before = AutoModelForCausalLM.from_pretrained(source).state_dict()
    after = load_dequantized(out).state_dict()
    kept = [name for name in after if "layers.0." in name and name in before]
    assert len(kept) > 4
    assert all(torch.equal(before[name], after[name]) for name in kept)
    block = next(name for name in before if "layers.0." in name and "gate_up_proj" in name)
    prefix = block.removesuffix("gate_up_proj")
    for expert, whole in enumerate(before[block]):
        parts = [after[f"{prefix}{expert}.{part}.weight"] for part in ("gate_proj", "up_proj")]
        assert torch.equal(torch.cat(parts), whole)
