"""What needs a backward pass is refused before anything is changed where there can be none."""

import pytest
import torch
from helpers import int4, oneshot, tiny_model

pytest.importorskip("llmcompressor")

from compressed_tensors.offload import offload_model
from compressed_tensors.offload.module import offload_module

from moeq_plugin import MoEQuantModifier, RWKVQuantModifier
from moeq_plugin.integrations.llm_compressor import preflight


def test_a_model_in_memory_is_taken_offloaded_there_or_not(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    preflight.check_backward_pass(model)
    offload_model(model, "cpu", "cpu")
    preflight.check_backward_pass(model)


def test_weights_on_disk_are_named(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path / "model")
    (tmp_path / "disk").mkdir()
    linear = model.model.layers[1].self_attn.o_proj
    offload_module(linear, "cpu", "disk", offload_dir=str(tmp_path / "disk"))
    with pytest.raises(ValueError, match=r"1 modules .* such as model.layers.1.self_attn.o_proj"):
        preflight.check_backward_pass(model)


def test_weights_nowhere_are_named(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"not in memory, such as lm_head.*row_feedback off"):
        preflight.check_backward_pass(model)


@pytest.mark.parametrize("modifier", [MoEQuantModifier, RWKVQuantModifier])
def test_a_run_asks_before_it_changes_anything(modifier, tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    model.extra = torch.nn.LayerNorm(4, device="meta")
    before = {name: p.clone() for name, p in model.named_parameters() if "experts" not in name}

    with pytest.raises(ValueError, match="not in memory, such as extra"):
        oneshot(model, modifier(row_feedback=True, config_groups=int4(16)))

    after = dict(model.named_parameters())
    kept = {name: p for name, p in before.items() if not p.is_meta}
    assert all(torch.equal(after[name], p) for name, p in kept.items())
    assert not hasattr(model.model.layers[0].self_attn.q_proj, "quantization_scheme")
