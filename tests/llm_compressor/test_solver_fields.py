"""Presets fill in fields, fields reach the solver, and what comes out can be read."""

import shutil

import pytest
import torch
import yaml
from helpers import int4, oneshot, tiny_model
from safetensors.torch import load_file

pytest.importorskip("llmcompressor")

from llmcompressor.recipe import Recipe
from transformers import AutoModelForCausalLM

from moeq_plugin import MoEQuantModifier, SensitivityTable
from moeq_plugin.core.solver_options import SolverOptions
from moeq_plugin.integrations.llm_compressor.checkpoint.loading import load_dequantized
from moeq_plugin.integrations.llm_compressor.solver_fields import PRESETS, Preset
from moeq_plugin.records.run import RunRecord

W3 = int4(16, num_bits=3)


def fields_of(modifier):
    return {name: getattr(modifier, name) for name in PRESETS[Preset.BALANCED]}


def quantized(directory, **fields):
    """Return the tensors that a checkpoint ends up with."""
    model = tiny_model("qwen3_moe", directory / "model")
    oneshot(model, MoEQuantModifier(config_groups=W3, **fields), output_dir=str(directory / "out"))
    return load_file(directory / "out" / "model.safetensors")


class TestPresets:
    def test_a_preset_fills_in_what_is_not_given(self):
        assert fields_of(MoEQuantModifier(preset="balanced")) == PRESETS[Preset.BALANCED]
        assert fields_of(MoEQuantModifier()) == PRESETS[Preset.BALANCED]
        plain = MoEQuantModifier(preset="fast").solver_options()
        assert plain == SolverOptions(dampening_frac=0.01) and plain.is_plain

    def test_who_asks_for_no_search_gets_no_signs(self):
        assert not MoEQuantModifier(scale_search="given").signed_scales

    @pytest.mark.parametrize(
        "given",
        [{"refine_rounds": 0}, {"dampening_frac": 0.01}, {"scale_search": "given"}],
        ids=lambda given: next(iter(given)),
    )
    def test_what_is_given_wins_even_where_it_is_a_default(self, given):
        expected = {**PRESETS[Preset.BALANCED], **given}
        if given == {"scale_search": "given"}:
            expected["signed_scales"] = False
        found = fields_of(MoEQuantModifier(preset="balanced", **given))
        assert {name: found[name] for name in expected if name in found} == {
            name: expected[name] for name in found
        }

    def test_a_recipe_that_was_written_means_the_same_when_it_is_read(self, tmp_path):
        made = MoEQuantModifier(preset="balanced", dampening_frac=0.02, scheme="W4A16")
        stage = {"quant_modifiers": {"MoEQuantModifier": made.model_dump(exclude_none=True)}}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"quant_stage": stage}))

        (read,) = Recipe.create_instance(str(path)).modifiers

        assert read.solver_options() == made.solver_options()
        assert read.preset is Preset.BALANCED

    def test_the_measuring_of_sensitivities_rounds_alike(self):
        modifier = MoEQuantModifier(preset="balanced", refine_rounds=3, bits_per_weight=3.0)
        assert modifier.sensitivity_modifier().solver_options() == modifier.solver_options()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"preset": "quick"}, "preset"),
            ({"scale_search": "wider"}, "scale_search"),
            ({"refine_rounds": -1}, "refine_rounds"),
            ({"preset": "fast", "signed_scales": True}, "needs a scale search"),
        ],
    )
    def test_refuses(self, fields, message):
        with pytest.raises(ValueError, match=message):
            MoEQuantModifier(**fields)


class TestQuantizing:
    def test_the_narrow_search_finds_what_the_hosts_observer_finds(self, tmp_path):
        ours = quantized(tmp_path / "ours", preset="fast", scale_search="narrow")
        theirs = quantized(tmp_path / "theirs", preset="fast", weight_observer="memoryless_mse")
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())

    def test_an_observer_that_was_asked_for_comes_before_a_search(self, tmp_path):
        observer = {"weight_observer": "memoryless_mse"}
        plain = quantized(tmp_path / "plain", **observer)
        searching = quantized(tmp_path / "searching", scale_search="group", **observer)
        assert all(torch.equal(searching[name], tensor) for name, tensor in plain.items())

    def test_a_refinement_loses_less_in_every_linear(self, tmp_path):
        searched = {"preset": "fast", "scale_search": "narrow"}
        quantized(tmp_path / "plain", **searched)
        quantized(tmp_path / "refined", **searched, refine_rounds=2)
        plain, refined = (
            {linear.name: linear.loss for linear in record.linears}
            for (record,) in (RunRecord.load(tmp_path / n / "out") for n in ("plain", "refined"))
        )
        first_layer = [name for name in plain if ".layers.0." in name]  # same inputs in both runs
        assert first_layer
        assert all(refined[name] < plain[name] for name in first_layer)

    def test_a_budget_is_spent_by_what_the_solver_that_ships_loses(self, tmp_path):
        def losses(name, **fields):
            model = tiny_model("qwen3_moe", tmp_path / name)
            options = ["W3A16_G16", "W4A16_G16"]
            budget = {"bits_per_weight": 5.5, "options": options}
            oneshot(model, MoEQuantModifier(**budget, **fields), output_dir=str(tmp_path / "out"))
            table = SensitivityTable.load(tmp_path / "out" / "moeq_sensitivity.json")
            shutil.rmtree(tmp_path / "out")
            return table.loss

        fast, searched = losses("fast", preset="fast"), losses("searched")

        assert (searched != fast).all()
        assert searched.sum() < fast.sum()

    @pytest.mark.parametrize("group_size", [16, None], ids=["groups", "channel"])
    @pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
    def test_negative_scales_read_right(self, num_bits, group_size, tmp_path):
        """By compressed-tensors in plain transformers, and by our own loader."""
        model = tiny_model("qwen3_moe", tmp_path / "model")
        modifier = MoEQuantModifier(
            config_groups=int4(group_size, num_bits=num_bits),
            ignore=["lm_head", "re:.*gate$"],
        )
        out = tmp_path / "out"
        oneshot(model, modifier)
        ids = torch.arange(1, 33)[None]
        with torch.no_grad():
            logits = model(ids).logits
        model.save_pretrained(out)

        stored = load_file(out / "model.safetensors")
        assert any((t < 0).any() for name, t in stored.items() if name.endswith("weight_scale"))
        ours = load_dequantized(out)
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(theirs(ids).logits, logits, rtol=1e-4, atol=1e-4)
