"""What a run with codebooks says of how far it is: every weight is counted, once."""

import pytest
import torch
from helpers import dataset, oneshot
from tiny_rwkv import ALL_IN_CODEBOOKS, MIXED, tiny_rwkv

pytest.importorskip("llmcompressor")

from transformers import AutoModelForCausalLM

import moeq_plugin.integrations.hf  # noqa: F401
from moeq_plugin import RWKVQuantModifier
from moeq_plugin.models.packed import packed_modules
from moeq_plugin.records.progress import listening
from moeq_plugin.records.run import RunRecord

LAYERS = 2
RECIPES = {
    "codebooks": ALL_IN_CODEBOOKS,
    "mixed": MIXED,
    # no grid, so that a budget puts all weights into codebooks
    "budget": {"bits_per_weight": 9.0, "options": ["CB4D2_G32x16", "CB6D2_G32x16"]},
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_weight_is_counted(name, tmp_path):
    tiny_rwkv(tmp_path / "model", torch.float32, num_hidden_layers=LAYERS)
    model, steps = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), []
    modifier = RWKVQuantModifier(**RECIPES[name])
    with listening(steps.append):
        oneshot(model, modifier, dataset(), output_dir=str(tmp_path / "out"))

    num_weights = len(modifier.record.linears)
    assert len(packed_modules(model)) <= num_weights
    for phase in ("quantize", *(["measure"] if name == "budget" else [])):
        of_phase = [step for step in steps if step.phase == phase]
        assert {step.total for step in of_phase} == {num_weights}
        assert [step.done for step in of_phase] == sorted(step.done for step in of_phase)
        assert (of_phase[0].done, of_phase[-1].done) == (0, num_weights)
        assert (of_phase[0].layer, of_phase[-1].layer) == (0, LAYERS)


@pytest.mark.parametrize(("name", "unit"), [("codebooks", "linears"), ("mixed", "weights")])
def test_vectors_are_not_called_linears(name, unit, tmp_path):
    model, steps = tiny_rwkv(tmp_path / "model", torch.float32), []
    modifier = RWKVQuantModifier(**RECIPES[name])
    with listening(steps.append):
        oneshot(model, modifier, dataset(), output_dir=str(tmp_path / "out"))

    assert {(step.phase, step.unit) for step in steps} == {("quantize", unit), ("save", unit)}
    (record,) = RunRecord.load(tmp_path / "out")
    count = len(record.linears)
    vectors = sum(".x_" in linear.name for linear in record.linears)
    assert (vectors > 0) == (unit == "weights")
    assert record.summary(count).startswith(f"quantized {count} of {count} {unit}, ")
