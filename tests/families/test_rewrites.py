"""Rotation and AWQ before quantization, on families that were not made for them: the same model.

They change weights so that less is lost, and what the model computes stays: with 8 bits the
checkpoint is nearly the source. Where a family's structure does not allow it they refuse, and
nothing is written.
"""

import pytest
import torch

pytest.importorskip("llmcompressor")

from examination import command, logits
from helpers import int4, oneshot
from safetensors.torch import load_file
from tiny_families import save_tiny

from moeq_plugin import MoEQuantAWQModifier, MoEQuantModifier
from moeq_plugin.integrations.llm_compressor import ResidualRotationModifier, load_dequantized

BOTH = ("glm4_moe", "minimax_m2", "dots1")
ONLY_AWQ = ("qwen3_vl_moe", "granitemoe")
pytestmark = pytest.mark.slow


def quantize(family, directory, *before):
    model = save_tiny(family, directory / "source")
    expected = logits(model)
    recipe = [*before, MoEQuantModifier(config_groups=int4(16, num_bits=8))]
    oneshot(model, recipe, output_dir=str(directory / "out"))
    return expected


@pytest.mark.parametrize("family", BOTH + ONLY_AWQ)
def test_the_model_stays_the_same(family, tmp_path):
    rewrites = [MoEQuantAWQModifier()]
    if family in BOTH:
        rewrites.insert(0, ResidualRotationModifier())
    expected = quantize(family, tmp_path, *rewrites)
    found = logits(load_dequantized(tmp_path / "out"))
    assert (found - expected).norm() < 0.05 * expected.norm()
    norms = [
        {n: t for n, t in load_file(path / "model.safetensors").items() if "layernorm" in n}
        for path in (tmp_path / "source", tmp_path / "out")
    ]
    assert any(not torch.equal(norms[0][name], norms[1][name]) for name in norms[0])
    code, said = command("verify", tmp_path / "out", "--source", tmp_path / "source")
    assert code == 0, said


@pytest.mark.parametrize(
    ("family", "modifier", "said"),
    [
        ("lfm2_moe", MoEQuantAWQModifier, "consists of conv"),
        ("ernie4_5_moe", ResidualRotationModifier, "residual stream"),
        ("granitemoe", ResidualRotationModifier, "residual stream"),
    ],
)
def test_what_cannot_be_rewritten_is_refused(family, modifier, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        quantize(family, tmp_path, modifier())
    assert not (tmp_path / "out").exists()
