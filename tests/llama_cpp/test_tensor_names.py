"""Names of tensors come from llama.cpp's own maps, for every family that is tested on."""

import re
import sys

import pytest

pytest.importorskip("llmcompressor")
pytest.importorskip("gguf")

from helpers import FAMILIES, tiny_model
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import nn

from moeq_plugin.integrations.llama_cpp.tensor_names import gguf_package, tensor_names
from moeq_plugin.models.moe import find_moe_layers


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_family_has_a_tensor_and_experts_share_theirs(family, tmp_path):
    model = tiny_model(family, tmp_path)
    linearize_moe(model)
    layers = find_moe_layers(model)
    kept = {model.lm_head} | {m for layer in layers for m in (layer.router, layer.shared_gate)}
    linears = [
        name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m not in kept
    ]
    names = tensor_names(linears, model.config.model_type)
    assert set(names) == set(linears)
    members = {}
    for module, tensor in names.items():
        layer = re.search(r"\.layers\.(\d+)\.", module)[1]
        assert tensor.startswith(f"blk.{layer}.") and tensor.endswith(".weight")
        members.setdefault(tensor, []).append(module)
    for layer in layers:
        number = re.search(r"\.layers\.(\d+)", layer.name)[1]
        for projection in ("gate", "up", "down"):
            experts = members[f"blk.{number}.ffn_{projection}_exps.weight"]
            numbers = [int(re.search(r"\.experts\.(\d+)\.", name)[1]) for name in experts]
            assert numbers == list(range(layer.num_experts))
            assert all(name.endswith(f"{projection}_proj") for name in experts)
    single = [tensor for tensor in members if "_exps" not in tensor]
    assert all(len(members[tensor]) == 1 for tensor in single)


def test_a_language_model_within_another_has_the_names_of_a_language_model():
    name = "model.layers.0.self_attn.q_proj"
    inner = name.replace("model.", "model.language_model.", 1)
    (alone,) = tensor_names([name], "qwen3_moe").values()
    (within,) = tensor_names([inner], "qwen3_moe").values()
    assert alone == within == "blk.0.attn_q.weight"


def test_an_unknown_family_is_refused_by_the_linears_that_nobody_knows():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mixer.strange_proj"]
    with pytest.raises(ValueError, match=r"strange_moe.*strange_proj"):
        tensor_names(names, "strange_moe")


def test_the_maps_of_the_package_stay_as_they_are():
    import gguf

    before = dict(gguf.TensorNameMap.block_mappings_cfg)
    tensor_names(["model.layers.0.self_attn.q_proj"], "qwen3_moe")
    assert gguf.TensorNameMap.block_mappings_cfg == before


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'moeq-plugin\[llamacpp\]'"):
        gguf_package()
