"""What is saved after AWQ loads, with the record of what was done and the recipe."""

import json

import pytest
import torch
import yaml
from helpers import FAMILIES, int4, oneshot, tiny_model, tokens

pytest.importorskip("llmcompressor")

from awq_smoothing import rounding
from transformers import AutoModelForCausalLM

from moeq_plugin import MoEQuantAWQModifier, MoEQuantModifier
from moeq_plugin.integrations.llm_compressor.checkpoint.loading import load_dequantized
from moeq_plugin.records.run import RunRecord


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_reloads_with_the_same_logits(family, tmp_path):
    model = tiny_model(family, tmp_path / "model")
    recipe = [MoEQuantAWQModifier(n_grid=5, clip=True), rounding()]
    oneshot(model, recipe)
    ids = tokens(2, 16, seed=5)
    expected = model(ids).logits

    model.save_pretrained(tmp_path / "out")

    if family == "gpt_oss":  # transformers has no rule to read its experts
        loaded = load_dequantized(tmp_path / "out")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    (record,) = RunRecord.load(tmp_path / "out")
    assert record == recipe[0].record
    assert record.smoothed
    assert record.settings["clip"] is True


def test_before_gptq_both_are_recorded(tmp_path):
    model = tiny_model("mixtral", tmp_path / "model")
    recipe = [MoEQuantAWQModifier(n_grid=5), MoEQuantModifier(config_groups=int4(16))]

    oneshot(model, recipe, output_dir=str(tmp_path / "out"))

    runs = json.loads((tmp_path / "out" / "moeq_run.json").read_text())["runs"]
    assert {run["modifier"]: len(run["linears"]) for run in runs} == {
        "MoEQuantAWQModifier": 0,
        "MoEQuantModifier": 2 * (4 + 4 * 3),
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = tokens(2, 16, seed=5)
    difference = (loaded(ids).logits - original(ids).logits).norm() / original(ids).logits.norm()
    assert difference < 0.5  # random experts would give 1


RECIPE = """
quant_stage:
  quant_modifiers:
    MoEQuantAWQModifier: {clip: true, n_grid: 5}
    QuantizationModifier:
      ignore: [lm_head]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 16}
"""


def test_a_yaml_recipe_and_its_copy_beside_the_checkpoint_give_one_result(tmp_path):
    first, second = (tiny_model("qwen3_moe", tmp_path / "model") for _ in range(2))

    oneshot(first, RECIPE, output_dir=str(tmp_path / "out"))
    written = (tmp_path / "out" / "recipe.yaml").read_text()
    oneshot(second, written)

    assert "MoEQuantAWQModifier" in yaml.safe_load(written)["quant_stage"]["quant_modifiers"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = tokens(1, 16)
    torch.testing.assert_close(loaded(ids).logits, second(ids).logits, rtol=1e-4, atol=1e-4)
