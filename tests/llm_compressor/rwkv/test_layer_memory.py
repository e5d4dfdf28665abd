"""Decoded weights are in memory while their layer is worked on, unless somebody comes behind."""

import weakref

import pytest
import torch
from helpers import dataset, int4, oneshot
from tiny_rwkv import ALL_IN_CODEBOOKS, ELEMENTWISE, tiny_rwkv

pytest.importorskip("llmcompressor")

from llmcompressor.modifiers.quantization import QuantizationModifier
from torch import nn
from transformers import AutoModelForCausalLM

from moeq_plugin import RWKVQuantModifier
from moeq_plugin.cli.rwkv import load_official
from moeq_plugin.integrations.llm_compressor.unfinished import is_unfinished
from moeq_plugin.models.packed import packed_modules
from moeq_plugin.records.progress import listening
from moeq_plugin.rwkv import to_official

LAYERS = 4
LARGE = ("key", "value", "output", "receptance")


def quantized(path, *behind, listener=lambda _model, _step: None, **settings):
    """Return the words of all packed weights."""
    model = AutoModelForCausalLM.from_pretrained(path)
    ours = RWKVQuantModifier(**ALL_IN_CODEBOOKS, **settings)
    with listening(lambda step: listener(model, step)):
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
    known, seen = [], []  # all weights there have been, decoded ones included

    def look(model, step):
        if step.phase == "quantize":
            linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
            large = {n: m for n, m in linears.items() if n.endswith(LARGE)}
            known.extend((layer(n), weakref.ref(m.weight)) for n, m in large.items())
            in_codebooks = {layer(name) for name in packed_modules(model)}
            alive = {of for of, weight in known if weight() is not None}
            seen.append((step.layer, in_codebooks, alive))

    packed = quantized(path, listener=look)

    every = set(range(LAYERS))
    assert seen == [
        (done, set(range(done - 1)), every - set(range(done - 1))) for done in range(LAYERS + 1)
    ]
    assert {layer(name) for name in packed} == every


def test_nothing_is_written_into_a_mapped_file(path, tmp_path):
    """It would stay in memory for as long as another weight of the file is needed."""
    file, in_memory = tmp_path / "model.pth", AutoModelForCausalLM.from_pretrained(path)
    torch.save(to_official(in_memory.state_dict()), file)
    model = load_official(str(file), "auto")
    mapped = {name: weight.detach() for name, weight in model.named_parameters()}
    before = {name: weight.clone() for name, weight in mapped.items()}
    oneshot(model, RWKVQuantModifier(**ALL_IN_CODEBOOKS, elementwise=ELEMENTWISE), dataset())

    assert [name for name in before if not torch.equal(mapped[name], before[name])] == []
    found, expected = packed_modules(model), quantized(path, elementwise=ELEMENTWISE)
    assert all(torch.equal(found[name].packed, expected[name]) for name in expected)


def test_a_modifier_behind_finds_linears_and_changes_no_codebook(path):
    def look(model, _step):
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
