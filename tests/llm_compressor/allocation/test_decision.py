"""Nothing is said of an allocation before there is one."""

import numpy as np
import pytest
from helpers import tiny_model

pytest.importorskip("llmcompressor")

from llmcompressor.modeling.moe.linearize import linearize_moe

from moeq_plugin.core.allocation import Allocation, BitBudget, allocate_bits
from moeq_plugin.core.sensitivity import SensitivityTable
from moeq_plugin.integrations.llm_compressor.allocation.allocator import BitAllocator
from moeq_plugin.integrations.llm_compressor.allocation.choices import Choices
from moeq_plugin.integrations.llm_compressor.allocation.options import parse_option
from moeq_plugin.integrations.llm_compressor.allocation.request import AllocationRequest
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity_config import SensitivityConfig
from moeq_plugin.models.moe import find_moe_layers
from moeq_plugin.models.scheme_units import Target

OPTIONS = ("W2A16_G16", "W4A16_G16", "UNQUANTIZED")
WHERE = {"targets": ["Linear"], "ignore": [], "weight_observer": None}


@pytest.fixture
def model(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    linearize_moe(model)
    return model


def request(**given):
    fields = {"bits_per_weight": None, "size_gb": None, "allocation": None, "robust": False}
    fields |= {"sensitivity": SensitivityConfig(), "target": Target.VLLM, "options": OPTIONS}
    return AllocationRequest(**{**fields, **given})


def table(model):
    choices = Choices.of(model, find_moe_layers(model), options=OPTIONS, **WHERE)
    loss = np.random.default_rng(0).random((1, len(choices.names), len(OPTIONS)))
    return choices.table(loss, ("all",))


def allocator(model, **given):
    return BitAllocator.of(request(**given), model, find_moe_layers(model), **WHERE)


@pytest.mark.parametrize(
    "ask",
    [
        lambda allocator: allocator.config_groups(),
        lambda allocator: allocator.check_attached(),
        lambda allocator: allocator.allocation,
    ],
    ids=["config_groups", "check_attached", "allocation"],
)
def test_an_allocator_that_has_to_measure_says_so(ask, model):
    undecided = allocator(model, bits_per_weight=5.0)
    assert not undecided.is_decided
    with pytest.raises(RuntimeError, match="sensitivities have to be measured first"):
        ask(undecided)


def test_a_table_or_an_allocation_decides_at_once_and_alike(model, tmp_path):
    table(model).save(tmp_path / "table.json")
    solved = allocator(model, bits_per_weight=5.0, sensitivity=str(tmp_path / "table.json"))
    solved.save(tmp_path)
    applied = allocator(model, allocation=str(tmp_path / "moeq_allocation.json"))

    assert solved.is_decided and applied.is_decided
    assert applied.allocation == solved.allocation
    assert applied.config_groups() == solved.config_groups()
    assert SensitivityTable.load(tmp_path / "moeq_sensitivity.json").rows == tuple(
        solved.allocation.choice
    )


def test_every_linear_is_in_one_group_or_ignored(model, tmp_path):
    found = table(model)
    allocate_bits(found, BitBudget(bits_per_weight=6.0)).save(tmp_path / "a.json")
    decided = allocator(model, allocation=str(tmp_path / "a.json"))
    groups, ignored = decided.config_groups()
    choice = Allocation.load(tmp_path / "a.json").choice
    assert ignored == [name for name, option in choice.items() if option == "UNQUANTIZED"]
    assert set(groups) == set(choice.values()) - {"UNQUANTIZED"}


def test_a_linear_with_another_scheme_than_was_chosen_is_named(model, tmp_path):
    table(model).save(tmp_path / "table.json")
    decided = allocator(model, bits_per_weight=5.0, sensitivity=str(tmp_path / "table.json"))
    choice = decided.allocation.choice
    quantized = [name for name, option in choice.items() if option != "UNQUANTIZED"]
    for name in quantized:
        scheme = parse_option(choice[name]).scheme
        model.get_submodule(name).quantization_scheme = scheme
    decided.check_attached()

    del model.get_submodule(quantized[-1]).quantization_scheme

    with pytest.raises(RuntimeError, match=f"{quantized[-1]} was to get W.* carries UNQUANTIZED"):
        decided.check_attached()


def test_sixteen_bits_are_no_scheme():
    with pytest.raises(ValueError, match=r"put \['a'\] into `ignore`"):
        parse_option("UNQUANTIZED").for_targets(["a"])
