"""An expert that is zero in the source may be zero; one that is not may not."""

import pytest
import torch
from helpers import dataset, int4, oneshot, tiny_model
from transformers import AutoModelForCausalLM

pytest.importorskip("llmcompressor")

from moeq_plugin import MoEQuantModifier, verify_checkpoint


def test_a_zero_expert_is_damage_only_where_the_source_has_none(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path / "sound")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[2] = 0
        model.model.layers[1].mlp.experts.down_proj[2] = 0
    model.save_pretrained(tmp_path / "zero")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "zero")
    oneshot(model, MoEQuantModifier(config_groups=int4()), dataset())
    model.save_pretrained(tmp_path / "out")

    assert verify_checkpoint(tmp_path / "out", tmp_path / "zero").findings == ()
    for source in (None, tmp_path / "sound"):
        found = {finding.check for finding in verify_checkpoint(tmp_path / "out", source).findings}
        assert "zeroed" in found
