"""No alarm: what each preset makes, of trained weights even where no recipe says how."""

from pathlib import Path

import pytest
from checkpoints import copy_of, edited_tensors
from helpers import dataset, int4, oneshot, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeq_plugin import MoEQuantModifier, verify_checkpoint

pytest.importorskip("llmcompressor")

from datasets import Dataset

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
SAID = {"vllm-kernel", "not-comparable"}


def alarms(path, source):
    """Return what is said beyond what is true of sound checkpoints all the same."""
    return [f for f in verify_checkpoint(path, source).findings if f.check not in SAID]


def modifier(preset, num_bits, group_size):
    groups = int4(group_size, num_bits=num_bits)
    return MoEQuantModifier(preset=preset, config_groups=groups, ignore=["lm_head"])


@pytest.mark.parametrize(("num_bits", "group_size"), [(2, 16), (3, 32), (4, 16), (8, 32)])
@pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
def test_a_preset_gives_no_alarm_with_the_source(preset, num_bits, group_size, tmp_path):
    model = tiny_model("qwen3_moe", tmp_path / "model")
    oneshot(model, modifier(preset, num_bits, group_size), dataset(4, 32))
    model.save_pretrained(tmp_path / "out")
    assert alarms(tmp_path / "out", tmp_path / "model") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "num_bits", "group_size"),
    [("balanced", 2, 16), ("best", 2, 16), ("best", 3, 128), ("best", 8, 128)],
)
def test_a_trained_model_and_few_data_give_no_alarm(preset, num_bits, group_size, tmp_path):
    """Trained weights have groups that a solver moves into others, few data the most of them."""
    source = ASSETS / "tiny_moe"
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = (ASSETS / "calibration.txt").read_text().split("\x1e")[:8]
    data = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"][:128] for text in texts]})
    oneshot(model, modifier(preset, num_bits, group_size), data)
    model.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "recipe.yaml").unlink()  # it would say that less is to be compared
    assert alarms(tmp_path / "out", source) == []
    _assert_damage_is_found(copy_of(tmp_path / "out", tmp_path / "damaged"), source)


def _assert_damage_is_found(path, source):
    """Limits that let corrections pass are no licence."""
    scales = "model.layers.2.mlp.experts.5.{}_proj.weight_scale"
    turned = "model.layers.1.mlp.experts.4.gate_proj.weight_packed"
    with edited_tensors(path) as tensors:
        tensors[scales.format("gate")] *= 1.5
        tensors[scales.format("up")] = tensors[scales.format("up")].abs()
        tensors[scales.format("down")][3] *= -1
        tensors[turned] = tensors[turned].roll(1, 0)
    named = {f.where for f in verify_checkpoint(path, source).errors}
    names = [scales.format(part).removesuffix(".weight_scale") for part in ("gate", "up", "down")]
    assert {*names, turned.removesuffix(".weight_packed")} <= named
