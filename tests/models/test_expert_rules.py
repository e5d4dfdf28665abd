"""What a config says of the names of experts is what the rules of the built model say."""

import sys

import pytest
import torch
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping

from moeq_plugin.checkpoint.families import FAMILIES
from moeq_plugin.models.auto_class import auto_class_of
from moeq_plugin.models.expert_rules import names_by_config, names_in_checkpoint

TYPES = {
    "mixtral": True, "qwen3_moe": True, "deepseek_v3": True, "minimax_m2": True,
    "nemotron_h": True, "phimoe": True, "qwen3_5_moe": True, "glm4v_moe": True,
    "gpt_oss": False, "granitemoe": False, "qwen3_vl_moe": False, "gemma4": False,
    "llama": False,
}  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_a_config_names_what_the_model_is_loaded_by(model_type):
    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        model = auto_class_of(config).from_config(_with_few_layers(config))
    stored = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    names = names_by_config(stored)
    assert names == names_in_checkpoint(get_model_conversion_mapping(model))
    assert bool(names) == TYPES[model_type]


def test_a_config_of_a_stranger_has_no_rule():
    for content in ({}, {"model_type": 3, "architectures": "x"}, {"text_config": [1]}):
        assert names_by_config(content) == {}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_that_we_know_are_named_without_transformers(model_type, monkeypatch):
    content = AutoConfig.for_model(model_type).to_dict()
    asked = names_by_config(content)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert names_by_config(content) == asked


def test_other_families_need_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    with pytest.raises(ModuleNotFoundError):
        names_by_config({"model_type": "phimoe"})


def _with_few_layers(config):
    text = config.get_text_config()
    text.num_hidden_layers = min(text.num_hidden_layers, 4)
    for key in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(text, key, None), list):
            setattr(text, key, getattr(text, key)[: text.num_hidden_layers])
    return config
