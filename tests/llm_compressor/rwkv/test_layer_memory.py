"""Decoded weights are in memory while their layer is worked on, unless somebody comes behind."""

import weakref

import pytest
import torch
from helpers import dataset, int4, oneshot
from tiny_rwkv import ALL_IN_CODEBOOKS, tiny_rwkv

pytest.importorskip("llmcompressor")

from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

from moeq_plugin import RWKVQuantModifier
from moeq_plugin.integrations.llm_compressor.unfinished import is_unfinished
from moeq_plugin.models.packed import packed_modules
from moeq_plugin.records.progress import listening

LAYERS = 4


def quantized(path, *behind, listener=lambda _model, _weights, _step: None):
    """Return the words of all packed weights."""
    model = AutoModelForCausalLM.from_pretrained(path)
    weights = {name: weakref.ref(p) for name, p in model.named_parameters() if ".blocks." in name}
    ours = RWKVQuantModifier(**ALL_IN_CODEBOOKS)
    with listening(lambda step: listener(model, weights, step)):
        oneshot(model, [ours, *behind], dataset())
    return {name: module.packed for name, module in packed_modules(model).items()}


def layer(name):
    return int(name.split(".")[2])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_rwkv(path, torch.float32, num_hidden_layers=LAYERS)
    return path


def test_they_leave_with_their_layer(path):
    seen = []

    def look(model, weights, step):
        if step.phase == "quantize":
            in_codebooks = {layer(name) for name in packed_modules(model)}
            alive = {
                layer(name) for name, of in weights.items() if of() is not None and is_large(name)
            }
            seen.append((step.layer, in_codebooks, alive))

    def is_large(name):
        return name.endswith(("key.weight", "value.weight", "output.weight", "receptance.weight"))

    packed = quantized(path, listener=look)

    every = set(range(LAYERS))
    assert seen == [
        (done, set(range(done - 1)), every - set(range(done - 1))) for done in range(LAYERS + 1)
    ]
    assert {layer(name) for name in packed} == every


def test_a_modifier_behind_finds_linears_and_changes_no_codebook(path):
    def look(model, _weights, _step):
        assert not packed_modules(model)

    groups = {"group_0": {**int4()["group_0"], "targets": ["lm_head"]}}
    behind = QuantizationModifier(config_groups=groups)
    found, alone = quantized(path, behind, listener=look), quantized(path)

    assert found.keys() == alone.keys()
    assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_of_a_run_that_was_stopped_no_packed_weight_counts_as_finished(path):
    model = AutoModelForCausalLM.from_pretrained(path)

    def stop(_step):
        if len(packed_modules(model)) > 0:
            raise KeyboardInterrupt

    with listening(stop), pytest.raises(KeyboardInterrupt):
        oneshot(model, RWKVQuantModifier(**ALL_IN_CODEBOOKS), dataset())

    changed = {name for name, module in model.named_modules() if is_unfinished(module)}
    assert changed >= packed_modules(model).keys() > set()
