"""What is left in memory when a run stops: as good as new, or refused; never half and half."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import int4, oneshot, tiny_model

pytest.importorskip("llmcompressor")

from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier

from moeq_plugin import MoEQuantModifier, RWKVQuantModifier
from moeq_plugin.integrations.llm_compressor import MoEQuantAWQModifier

RECIPES = {
    "scheme": lambda: MoEQuantModifier(config_groups=int4(16)),
    "budget": lambda: MoEQuantModifier(
        bits_per_weight=7.0, options=["W4A16_G16", "W8A16_G16"], sensitivity={"gradient": False}
    ),
    "codebooks": lambda: RWKVQuantModifier(scalar_frac=0.5),
    "host": lambda: GPTQModifier(config_groups=int4(16), ignore=["lm_head", "re:.*gate$"]),
}


def weights(model):
    return {name: p for name, p in model.named_parameters() if name.endswith("weight")}


def stop_in_layer(number, model, modifier):
    """Run until the first time that a layer of the model is called to be calibrated."""

    def stop(*_):
        if modifier.started_:
            raise KeyboardInterrupt

    handle = model.model.layers[number].self_attn.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        oneshot(model, modifier)
    handle.remove()


@pytest.mark.parametrize("first", RECIPES)
def test_a_model_that_is_half_quantized_is_refused(first, tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    stop_in_layer(1, model, RECIPES[first]())
    before = {name: p.clone() for name, p in weights(model).items()}
    number = {"host": 32, "codebooks": 16}.get(first, 16)
    message = f"{number} of 32 targeted modules were quantized by a run that did not finish, load"
    with pytest.raises(ValueError, match=message):
        oneshot(model, MoEQuantModifier(config_groups=int4(16)))
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


def test_a_model_that_is_half_smoothed_is_refused(tmp_path):
    """Clamped weights would be clamped again, and scales chosen for what is scaled already."""
    model = tiny_model("qwen3_moe", tmp_path / "source")
    rounding = QuantizationModifier(config_groups=int4(16), ignore=["lm_head", "re:.*gate$"])
    awq = MoEQuantAWQModifier(n_grid=3, clip=True)

    def stop(*_):
        if awq.record.smoothed:
            raise KeyboardInterrupt

    handle = model.model.layers[1].self_attn.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        oneshot(model, [awq, rounding])
    handle.remove()
    before = {name: p.clone() for name, p in weights(model).items()}
    for recipe in ([MoEQuantAWQModifier(n_grid=3), rounding.model_copy()], RECIPES["scheme"]()):
        with pytest.raises(ValueError, match=r"by a run that did not finish, load the model again"):
            oneshot(model, recipe)
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


def test_a_copy_of_it_is_refused_too(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    stop_in_layer(1, model, RECIPES["scheme"]())
    with pytest.raises(ValueError, match="16 of 32 targeted modules"):
        oneshot(copy.deepcopy(model), MoEQuantModifier(config_groups=int4(16)))


def test_other_targets_of_it_are_refused_too(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    attention = int4(16)
    attention["group_0"]["targets"] = ["re:.*layers.0.self_attn.*"]
    stop_in_layer(1, model, MoEQuantModifier(config_groups=attention))
    experts = int4(16)
    experts["group_0"]["targets"] = ["re:.*mlp.experts.*"]
    with pytest.raises(ValueError, match="4 modules of the model were changed by a run that did"):
        oneshot(model, MoEQuantModifier(config_groups=experts))


@pytest.mark.parametrize("first", ["scheme", "codebooks"])
def test_it_cannot_be_saved(first, tmp_path):
    model = tiny_model("qwen3_moe", tmp_path / "source")
    stop_in_layer(1, model, RECIPES[first]())
    with pytest.raises(ValueError, match="16 modules of this model were changed by a run that did"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("first", ["scheme", "budget", "codebooks"])
def test_a_model_that_was_not_changed_yet_is_as_good_as_new(first, tmp_path):
    model, fresh = (tiny_model("qwen3_moe", tmp_path / "source") for _ in range(2))
    stop_in_layer(0, model, RECIPES[first]())
    original = weights(tiny_model("qwen3_moe", tmp_path / "source"))
    assert all(
        torch.equal(p, original[name]) for name, p in weights(model).items() if name in original
    )
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "moeq_run.json").exists()
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()

    for each in (model, fresh):
        oneshot(each, RECIPES["scheme"](), output_dir=str(tmp_path / str(id(each))))
    expected = weights(fresh)
    assert all(torch.equal(p, expected[name]) for name, p in weights(model).items())
    files = [(tmp_path / str(id(x)) / "model.safetensors").read_bytes() for x in (model, fresh)]
    assert files[0] == files[1]


@pytest.mark.parametrize("how", ["interrupted", "finished"])
def test_a_modifier_serves_one_run(how, tmp_path):
    model, modifier = tiny_model("qwen3_moe", tmp_path), RECIPES["scheme"]()
    if how == "finished":
        oneshot(model, modifier)
    else:
        stop_in_layer(1, model, modifier)
    with pytest.raises(ValueError, match="this MoEQuantModifier has been used by another run"):
        oneshot(tiny_model("qwen3_moe", tmp_path), modifier)


def test_a_run_that_stopped_is_not_finished_by_the_next(tmp_path):
    """The host finalizes what has failed when the next run begins; the record would be a lie."""
    model, modifier = tiny_model("qwen3_moe", tmp_path), RECIPES["codebooks"]()
    stop_in_layer(1, model, modifier)
    oneshot(tiny_model("qwen3_moe", tmp_path), RECIPES["scheme"]())
    assert modifier.record.run == {}
    assert not modifier.finalized_


@pytest.mark.parametrize("fails", [False, True])
def test_runs_leave_no_model_behind(fails, tmp_path):
    alive = []
    for _ in range(5):
        model = tiny_model("qwen3_moe", tmp_path)
        if fails:
            stop_in_layer(1, model, RECIPES["scheme"]())
        else:
            oneshot(model, RECIPES["scheme"]())
        alive.append(weakref.ref(model))
        del model
        gc.collect()
    # the host's session knows the last one until the next run
    assert [ref() is not None for ref in alive] == [False] * 4 + [True]
