"""A failed run of MoEQuantAWQModifier leaves its recipe, the host and a model's hooks as before."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import dataset, int4, oneshot, tiny_model

pytest.importorskip("llmcompressor")

from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.modeling.moe import context as moe_context
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.awq import base as awq_base
from llmcompressor.pipelines.cache import IntermediatesCache
from pydantic import PrivateAttr
from torch import nn

from moeq_plugin import MoEQuantAWQModifier

FIELDS = {"n_grid": 4, "clip": True, "seed": 3}


def rounding():
    return QuantizationModifier(config_groups=int4(16), ignore=["lm_head", "re:.*gate$"])


def one_layer(directory):
    return tiny_model("qwen3_moe", directory, num_hidden_layers=1)


def refused_for_its_output_directory(awq, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "of_something").touch()
    with pytest.raises(ValueError, match="not empty"):
        oneshot(one_layer(tmp_path / "model"), [awq, rounding()], output_dir=str(full))


def refused_for_want_of_a_scheme(awq, tmp_path):
    groups = int4(16)
    groups["group_0"]["targets"] = ["lm_head"]
    with pytest.raises(ValueError, match="quantizes nothing that scales could be moved into"):
        oneshot(one_layer(tmp_path / "model"), [awq, QuantizationModifier(config_groups=groups)])


@pytest.mark.parametrize("mappings", [None, [AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])]])
@pytest.mark.parametrize("refuse", [refused_for_its_output_directory, refused_for_want_of_a_scheme])
def test_a_refused_recipe_is_as_it_was_and_works_afterwards(refuse, mappings, tmp_path):
    awq, untouched = (MoEQuantAWQModifier(**FIELDS, mappings=mappings) for _ in range(2))
    as_constructed = awq.model_dump()

    refuse(awq, tmp_path)
    assert awq.model_dump() == as_constructed

    models = [one_layer(tmp_path / "model") for _ in range(2)]
    for modifier, model in zip((awq, untouched), models, strict=True):
        oneshot(model, [modifier, rounding()])
    assert awq.record.settings == untouched.record.settings
    assert awq.record.smoothed == untouched.record.smoothed
    assert awq.record.smoothed
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_run_writes_no_field(tmp_path):
    awq = MoEQuantAWQModifier(**FIELDS)
    as_constructed = awq.model_dump(exclude=set(Modifier.model_fields))
    oneshot(one_layer(tmp_path), [awq, rounding()])
    assert awq.model_dump(exclude=set(Modifier.model_fields)) == as_constructed


@pytest.mark.parametrize("field", sorted(set(MoEQuantAWQModifier.model_fields)
                                         - set(Modifier.model_fields)))  # fmt: skip
def test_no_field_can_be_written_after_construction(field):
    awq = MoEQuantAWQModifier()
    with pytest.raises(AttributeError, match=rf"MoEQuantAWQModifier\.{field} .* never written"):
        setattr(awq, field, getattr(awq, field))


def raise_planted(*_arguments):
    raise RuntimeError("planted")


def raise_in_an_expert(model):
    """While it runs on its tokens, with the host's flag lowered."""
    expert = next(m for n, m in model.named_modules() if n.endswith("experts.1"))
    return expert.register_forward_pre_hook(raise_planted)


def raise_in_the_search(model):
    """While weights are scaled and rounded on trial, with the host's AWQ patched."""
    calls = []

    def raise_later(*arguments):
        calls.append(arguments)
        if len(calls) > 8 + 8 + 8:  # the batches of the pass, on the original and on trial
            raise_planted()

    return model.model.layers[0].self_attn.register_forward_pre_hook(raise_later)


def test_what_is_not_ours_has_the_hosts_defaults():
    for name, field in AWQModifier.model_fields.items():
        assert getattr(MoEQuantAWQModifier(), name) == field.get_default()


@pytest.mark.parametrize("device", [{}, {"offload_device": None}, {"offload_device": "cpu"},
                                    {"offload_device": torch.device("cpu")}])  # fmt: skip
def test_a_device_is_read_back_as_it_was_given(device):
    awq = MoEQuantAWQModifier(**device)
    again = MoEQuantAWQModifier(**json.loads(json.dumps(awq.model_dump())))
    assert again.offload_device == awq.offload_device
    assert type(again.offload_device) is not str


class Failing(Modifier):
    """Raises at an event, or later; behind AWQ in a recipe, which has done its part by then."""

    at: str
    by: Callable[[nn.Module], Any] = raise_planted
    requires_calibration_data: bool = True
    _planted: list = PrivateAttr(default_factory=list)

    def on_initialize(self, state, **kwargs):
        return self._plant("on_initialize", state)

    def on_calibration_start(self, state, event, **kwargs):
        self._plant("on_calibration_start", state)

    def on_sequential_epoch_end(self, state, event, modules, **kwargs):
        self._plant("on_sequential_epoch_end", state)

    def on_calibration_end(self, state, event, **kwargs):
        self._plant("on_calibration_end", state)

    def _plant(self, event, state):
        if self.at == event:
            self._planted.append(self.by(state.model))
        return True

    def remove(self):
        for handle in self._planted:
            handle.remove()


FAILURES = {
    "when initialized": {"at": "on_initialize"},
    "when calibration starts": {"at": "on_calibration_start"},
    "in an expert": {"at": "on_calibration_start", "by": raise_in_an_expert},
    "in the search": {"at": "on_calibration_start", "by": raise_in_the_search},
    "at the end of a layer": {"at": "on_sequential_epoch_end"},
    "when calibration ends": {"at": "on_calibration_end"},
}


def hooks_of(model):
    """Return how many hooks each module has, without the observers that the host attaches."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = {n: m for n, m in model.named_modules() if "observer" not in n}
    return {(n, kind): len(getattr(m, kind)) for n, m in modules.items() for kind in kinds}


def state_of_the_host():
    everything = {of.__name__: dict(vars(of)) for of in (IntermediatesCache, Oneshot, awq_base)}
    return everything, moe_context._CALIBRATE_ALL_EXPERTS


@pytest.mark.parametrize("all_experts", [True, False])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_run_leaves_host_and_model_as_they_were(failure, all_experts, tmp_path):
    model = one_layer(tmp_path)
    linearize_moe(model)
    awq, failing = MoEQuantAWQModifier(**FIELDS), Failing(**FAILURES[failure])
    as_constructed = awq.model_dump()
    hooks, host = hooks_of(model), state_of_the_host()

    with pytest.raises(RuntimeError, match="planted") as raised:
        oneshot(
            model,
            [awq, failing, rounding()],
            dataset(8, 16),
            pipeline="sequential",
            moe_calibrate_all_experts=all_experts,
        )

    failing.remove()
    assert hooks_of(model) == hooks
    assert state_of_the_host() == host
    assert awq.model_dump() == as_constructed
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    frames = {frame.name for frame in raised.traceback}
    assert ("_compute_best_scale" in frames) == (failure == "in the search")


@pytest.mark.parametrize("all_experts", [True, False])
def test_the_hosts_flag_is_its_own_again_as_soon_as_an_expert_has_raised(all_experts, tmp_path):
    """Before the end of the oneshot, where the host puts it back itself."""
    model, seen = one_layer(tmp_path), []
    linearize_moe(model)
    model.model.layers[0].mlp.register_forward_hook(
        lambda *_: seen.append(moe_context._CALIBRATE_ALL_EXPERTS), always_call=True
    )
    failing = Failing(**FAILURES["in an expert"])

    with pytest.raises(RuntimeError, match="planted"):
        oneshot(
            model,
            [MoEQuantAWQModifier(**FIELDS), failing, rounding()],
            pipeline="sequential",
            moe_calibrate_all_experts=all_experts,
        )

    assert seen[-1] == all_experts


def test_after_a_failure_in_the_middle_the_same_recipe_works(tmp_path):
    awq, failing = MoEQuantAWQModifier(**FIELDS), Failing(at="on_sequential_epoch_end")
    with pytest.raises(RuntimeError, match="planted"):
        oneshot(one_layer(tmp_path), [awq, failing, rounding()], pipeline="sequential")

    oneshot(one_layer(tmp_path), [awq, rounding()])

    assert len(awq.record.smoothed) == 2 + 4
