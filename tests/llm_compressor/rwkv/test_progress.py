"""What a run with codebooks says of how far it is: every weight is counted, once."""

import pytest
import torch
from helpers import dataset, oneshot
from tiny_rwkv import tiny_rwkv

pytest.importorskip("llmcompressor")

from transformers import AutoModelForCausalLM

import moeq_plugin.integrations.hf  # noqa: F401
from moeq_plugin import RWKVQuantModifier
from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.models.packed import packed_modules
from moeq_plugin.records.progress import listening

FORM = CodebookFormat(4, 2, group_rows=32, group_columns=16)
LAYERS = 2
RECIPES = {
    "codebooks": {"scalar_frac": 0.0, "codebook": FORM},
    "mixed": {
        "scalar_frac": 0.5,
        "codebook": FORM,
        "elementwise": CodebookFormat(3, 1, group_rows=1, group_columns=64),
    },
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
