"""A run that fails, wherever it does, leaves the recipe and llm-compressor as they were."""

import pytest
import torch
from helpers import int4, oneshot, tiny_model

pytest.importorskip("llmcompressor")

from compressed_tensors.offload.cache import DistributedCPUCache
from llmcompressor.core import active_session
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.modeling.moe import context as moe_context
from llmcompressor.modifiers.transform.awq import base as awq_base
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential import SequentialPipeline

from moeq_plugin import MoEQuantModifier, RWKVQuantModifier
from moeq_plugin.integrations.llm_compressor.frozen_fields import HOST_STATE
from moeq_plugin.integrations.llm_compressor.moequant.run import Run

TOUCHED = (Oneshot, IntermediatesCache, SequentialPipeline, DistributedCPUCache)
BUDGET = {"bits_per_weight": 6.0, "options": ["W3A16_G16", "W4A16_G16", "W8A16_G16"]}
RECIPES = {
    "scheme": lambda: MoEQuantModifier(config_groups=int4(16)),
    "budget": lambda: MoEQuantModifier(**BUDGET),
    "codebooks": lambda: RWKVQuantModifier(scalar_frac=0.5),
}


class DiskFullError(Exception):
    """Stands for whatever goes wrong."""


def raising(*_args, **_kwargs):
    raise DiskFullError


def host_state():
    """Return everything of the host's that has ever been touched."""
    return [
        *(dict(vars(owner)) for owner in TOUCHED),
        awq_base.is_distributed,
        moe_context._CALIBRATE_ALL_EXPERTS,
    ]


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def asked_for(modifier):
    return {name: v for name, v in modifier.model_dump().items() if name not in HOST_STATE}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("phase", ["begin", "finish_layer", "end", "close"])
def test_a_run_that_raises_in_any_phase(phase, recipe, tmp_path, monkeypatch):
    model = tiny_model("qwen3_moe", tmp_path)
    oneshot(
        tiny_model("qwen3_moe", tmp_path), RECIPES[recipe]()
    )  # a good run: what is installed once
    before, modifier = host_state(), RECIPES[recipe]()
    fields = asked_for(modifier)
    monkeypatch.setattr(Run, phase, raising)

    with pytest.raises(DiskFullError):
        oneshot(model, modifier)

    assert host_state() == before
    assert asked_for(modifier) == fields
    assert hooks(model) == 0


def test_runs_that_end_in_a_nan_pile_nothing_up(tmp_path):
    before = host_state()
    for _ in range(3):
        model = tiny_model("qwen3_moe", tmp_path)
        model.model.embed_tokens.weight.data[:] = float("nan")
        with pytest.raises(ValueError, match="NaN or infinity"):
            oneshot(model, MoEQuantModifier(config_groups=int4(16)))
        assert host_state() == before
        assert hooks(model) == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_refused_run_can_be_repeated_with_the_same_object(recipe, tmp_path):
    """A full output directory is refused after schemes could have been decided."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    modifier, fresh = RECIPES[recipe](), RECIPES[recipe]()
    fields = asked_for(modifier)
    model, expected = (tiny_model("qwen3_moe", tmp_path / "source") for _ in range(2))

    with pytest.raises(ValueError, match="is not empty"):
        oneshot(model, modifier, output_dir=str(full))
    assert asked_for(modifier) == fields
    oneshot(model, modifier)
    oneshot(expected, fresh)

    assert [r.name for r in modifier.record.linears] == [r.name for r in fresh.record.linears]
    theirs = dict(expected.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("name", ["ignore", "scheme", "config_groups", "affinity_power"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_field_cannot_be_written(recipe, name):
    modifier = RECIPES[recipe]()
    with pytest.raises(AttributeError, match=f"{name} says what was asked for"):
        setattr(modifier, name, None)


def test_reading_the_resolved_schemes_changes_no_field():
    """The host completes schemes in place: its order of columns, its observers."""
    modifier = MoEQuantModifier(config_groups=int4(16), weight_observer="memoryless_mse")
    fields = asked_for(modifier)
    (resolved,) = modifier.resolved_config.config_groups.values()
    assert resolved.weights.observer == "memoryless_mse"
    assert asked_for(modifier) == fields


def test_what_a_run_decides_is_not_in_the_recipe(tmp_path):
    groups = int4(16)
    modifier = MoEQuantModifier(config_groups=groups, actorder="static")
    fields = asked_for(modifier)
    oneshot(tiny_model("qwen3_moe", tmp_path), modifier)
    assert asked_for(modifier) == fields
    assert groups == int4(16)
    assert "ignore" not in modifier.model_fields_set
    assert active_session().lifecycle.recipe.modifiers == [modifier]
