"""A measuring pass leaves the model as it was, however it ends, and the recipe too."""

import pytest
from helpers import dataset, oneshot, tiny_model

pytest.importorskip("llmcompressor")

from llmcompressor.core import State
from llmcompressor.modeling.moe.context import get_calibrate_all_experts_flag

from moeq_plugin import MoEQuantModifier
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity import SensitivityModifier
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity_config import SensitivityConfig
from moeq_plugin.integrations.llm_compressor.frozen_fields import HOST_STATE

OPTIONS = ["W2A16_G16", "W4A16_G16", "UNQUANTIZED"]
WITHOUT_GRADIENT = SensitivityConfig(gradient=False)


class BrokenLayerError(Exception):
    """Raised by a layer of the model."""


def raising(_layer, _args):
    raise BrokenLayerError


def to_nan(_layer, _args, output):
    return output * float("nan")


def measuring(**arguments):
    return SensitivityModifier(options=OPTIONS, **arguments)


def hooks(model):
    """Return how many hooks of each kind every module has, and which carry a scheme."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        name: [len(getattr(module, kind)) for kind in kinds]
        + [hasattr(module, "quantization_scheme"), hasattr(module, "weight_observer")]
        for name, module in model.named_modules()
    }


def fields(modifier):
    return {name: v for name, v in modifier.model_dump().items() if name not in HOST_STATE}


FAILURES = {
    "start": ({}, dataset(1), None, ValueError),
    "backward": ({}, dataset(4), raising, BrokenLayerError),
    "second layer": ({"config": WITHOUT_GRADIENT}, dataset(4), raising, BrokenLayerError),
    "table": ({"config": WITHOUT_GRADIENT}, dataset(4), to_nan, ValueError),
}


@pytest.mark.parametrize("phase", FAILURES)
def test_a_failed_pass_leaves_what_a_finished_one_leaves(phase, tmp_path):
    arguments, data, hook, error = FAILURES[phase]
    finished = tiny_model("qwen3_moe", tmp_path / "finished")
    oneshot(finished, measuring(**arguments), dataset(4))
    model, modifier = tiny_model("qwen3_moe", tmp_path / "model"), measuring(**arguments)
    layer = model.model.layers[1]
    if hook is raising:
        handle = layer.register_forward_pre_hook(hook)
    elif hook is to_nan:
        handle = layer.input_layernorm.register_forward_hook(hook)
    flag = get_calibrate_all_experts_flag()

    with pytest.raises(error):
        oneshot(model, modifier, data)

    if hook is not None:
        handle.remove()
    assert hooks(model) == hooks(finished)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert get_calibrate_all_experts_flag() == flag
    assert fields(modifier) == fields(measuring(**arguments))
    with pytest.raises(RuntimeError, match="nothing has been measured yet"):
        modifier.table  # noqa: B018 - it is the look that is refused


def test_what_is_measured_after_a_failure_is_what_would_have_been_measured_before(tmp_path):
    before, after = measuring(), measuring()
    oneshot(tiny_model("qwen3_moe", tmp_path / "a"), before, dataset(4))
    broken = tiny_model("qwen3_moe", tmp_path / "b")
    handle = broken.model.layers[1].register_forward_pre_hook(raising)
    with pytest.raises(BrokenLayerError):
        oneshot(broken, measuring(config=WITHOUT_GRADIENT), dataset(4))
    handle.remove()

    oneshot(broken, after, dataset(4))

    assert (after.table.loss == before.table.loss).all()


def test_a_pass_inside_another_modifiers_run_is_undone_with_it(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path / "model")
    handle = model.model.layers[1].register_forward_pre_hook(raising)
    modifier = MoEQuantModifier(bits_per_weight=5.0, options=OPTIONS, sensitivity=WITHOUT_GRADIENT)
    with pytest.raises(BrokenLayerError):
        oneshot(model, modifier, dataset(4))
    handle.remove()
    finished = tiny_model("qwen3_moe", tmp_path / "finished")
    oneshot(finished, measuring(config=WITHOUT_GRADIENT), dataset(4))
    assert hooks(model) == hooks(finished)


@pytest.mark.parametrize("name", sorted(SensitivityModifier.model_fields.keys() - HOST_STATE))
def test_fields_say_what_was_asked_for_from_construction_to_the_end(name):
    modifier = measuring()
    with pytest.raises(AttributeError, match=f"SensitivityModifier.{name} says what was asked"):
        setattr(modifier, name, getattr(modifier, name))


def test_refuses_to_measure_without_data(tmp_path):
    state = State(model=tiny_model("qwen3_moe", tmp_path))
    with pytest.raises(ValueError, match="measured on data: pass dataset="):
        measuring().initialize(state)
