"""The codes in a file are those that were solved for: nothing is rounded a second time."""

import pytest
import torch
from helpers import int4, oneshot, uneven_model

pytest.importorskip("llmcompressor")

from moeq_plugin import MoEQuantModifier
from moeq_plugin.integrations.llm_compressor import load_dequantized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_reloading_gives_the_weights_in_memory(bits, symmetric, dtype, tmp_path):
    model = uneven_model("qwen3_moe", tmp_path / "source", dtype=dtype)
    groups = int4(16, num_bits=bits, symmetric=symmetric)
    modifier = MoEQuantModifier(config_groups=groups)
    oneshot(model, modifier)
    # a bfloat16 weight cannot hold every code that is more than 128 steps from its zero point
    is_inexact = bits == 8 and not symmetric and dtype == torch.bfloat16
    assert any("saving may move a code" in limit for limit in modifier.record.limits) == is_inexact
    solved = {n: m.weight.clone() for n, m in model.named_modules() if hasattr(m, "weight_scale")}

    model.save_pretrained(tmp_path / "saved")

    reloaded = load_dequantized(tmp_path / "saved")
    assert len(solved) == 2 * (4 + 4 * 3)
    for name, weight in solved.items():
        same = (reloaded.get_submodule(name).weight == weight).float().mean()
        assert same > 0.99 if is_inexact else same == 1, name
