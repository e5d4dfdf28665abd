"""A budget for an RWKV: grids and codebooks by what they lose, to the byte."""

import json

import numpy as np
import pytest
import torch
from helpers import oneshot, tiny_model
from tiny_rwkv import tiny_rwkv

pytest.importorskip("llmcompressor")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moeq_plugin.integrations.hf  # noqa: F401
from moeq_plugin import MoEQuantModifier, RWKVQuantModifier, SensitivityTable, verify_checkpoint
from moeq_plugin.core.allocation import Allocation
from moeq_plugin.integrations.llm_compressor.allocation.options import parse_option
from moeq_plugin.models.packed import packed_modules
from moeq_plugin.records.run import RunRecord

OPTIONS = ["CB3D2_G32x16", "CB5D2_G32x32", "CB3D1_G16x32", "W4A16_G32", "W8A16_G32", "UNQUANTIZED"]
BITS = 3.6


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """Return where a model is that was quantized to a budget, and its source."""
    path = tmp_path_factory.mktemp("budget")
    model = tiny_rwkv(path / "source", torch.bfloat16)
    oneshot(
        model,
        RWKVQuantModifier(bits_per_weight=BITS, options=OPTIONS),
        output_dir=str(path / "out"),
    )
    return path / "out"


def test_the_allocation_s_bytes_are_those_of_the_file(chosen):
    allocation = Allocation.load(chosen / "moeq_allocation.json")
    stored = load_file(chosen / "model.safetensors")
    names = set(allocation.choice)
    found = sum(t.nbytes for key, t in stored.items() if key.rpartition(".")[0] in names)
    assert found == allocation.num_bytes
    assert 0.95 * BITS < allocation.bits_per_weight <= BITS


def test_every_linear_is_stored_in_what_was_chosen_for_it(chosen):
    choice = Allocation.load(chosen / "moeq_allocation.json").choice
    model = AutoModelForCausalLM.from_pretrained(chosen)
    packed = packed_modules(model)
    schemes = {r.name: r.scheme for r in RunRecord.load(chosen)[0].linears}
    assert len(choice) == 12
    assert len(set(choice.values())) > 2
    assert any(option.startswith("CB") for option in choice.values())
    assert any(option.startswith("W") for option in choice.values())
    for name, option in choice.items():
        form = parse_option(option).codebook
        assert (name in packed) == (form is not None)
        assert schemes.get(name, "UNQUANTIZED") == parse_option(option).describe()


def test_no_option_for_all_within_the_budget_is_predicted_to_lose_less(chosen):
    table = SensitivityTable.load(chosen / "moeq_sensitivity.json")
    allocation = Allocation.load(chosen / "moeq_allocation.json")
    loss, size = table.loss.mean(0).sum(0), table.num_bytes.sum(0)
    within = size <= allocation.limit_bytes
    assert within.any()
    assert not within.all()
    assert allocation.value <= loss[within].min()
    assert (table.loss[..., OPTIONS.index("UNQUANTIZED")] == 0).all()
    assert (np.diff(table.loss.mean((0, 1))[[0, 1, 3, 4]]) < 0).all()  # more bits lose less


def test_the_checkpoint_is_sound(chosen):
    report = verify_checkpoint(chosen, chosen.parent / "source", target="transformers")
    assert [(f.check, f.where) for f in report.findings] == []


def test_an_allocation_is_applied_as_it_is(chosen, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(chosen.parent / "source")
    allocation = str(chosen / "moeq_allocation.json")

    oneshot(model, RWKVQuantModifier(allocation=allocation), output_dir=str(tmp_path / "out"))

    ours, theirs = (load_file(of / "model.safetensors") for of in (tmp_path / "out", chosen))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_size_is_that_of_all_tensors(chosen, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(chosen.parent / "source")
    full = sum(p.nbytes for p in model.parameters())
    size_gb = 0.6 * full / 1e9

    recipe = RWKVQuantModifier(
        size_gb=size_gb, sensitivity=str(chosen / "moeq_sensitivity.json"), options=OPTIONS
    )
    oneshot(model, recipe, output_dir=str(tmp_path / "out"))

    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert 0.55 * full < sum(t.nbytes for t in stored.values()) <= size_gb * 1e9


def test_experts_can_have_codebooks_too(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path / "moe")
    recipe = RWKVQuantModifier(bits_per_weight=4.5, options=["CB4D2_G32x16", "W8A16_G16"])

    oneshot(model, recipe, output_dir=str(tmp_path / "out"))

    choice = json.loads((tmp_path / "out" / "moeq_allocation.json").read_text())["choice"]
    assert set(choice.values()) == {"CB4D2_G32x16", "W8A16_G16"}
    coded = {name for name, option in choice.items() if option.startswith("CB")}
    assert set(packed_modules(model)) == coded
    for layer in ("layers.0.", "layers.1."):  # a server holds the experts of a layer in one scheme
        experts = {o for n, o in choice.items() if layer in n and ".experts." in n}
        assert len(experts) == 1


@pytest.mark.parametrize("given", ["options", "allocation"])
def test_who_rounds_to_grids_only_refuses_codebooks(given, chosen, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(chosen.parent / "source")
    asked = {"bits_per_weight": BITS, "options": OPTIONS}
    if given == "allocation":
        asked = {"allocation": str(chosen / "moeq_allocation.json")}
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="codebooks are made by RWKVQuantModifier"):
        oneshot(model, MoEQuantModifier(**asked))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_budget_below_all_options_is_refused_with_what_there_is(tmp_path):
    model = tiny_rwkv(tmp_path)
    recipe = RWKVQuantModifier(bits_per_weight=1.0, options=OPTIONS)
    with pytest.raises(ValueError, match="the options reach from [1-3].* to 1[67]"):
        oneshot(model, recipe)
