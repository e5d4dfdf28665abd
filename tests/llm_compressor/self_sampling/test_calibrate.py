"""oneshot without a data set: the model writes its own."""

from pathlib import Path

import pytest
import torch
from helpers import NoProcessor, int4, oneshot, tiny_model

pytest.importorskip("llmcompressor")

from llmcompressor import oneshot as host
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moeq_plugin import EBSSConfig, MoEQuantModifier, ebss_dataset

ASSETS = Path(__file__).parents[3] / "examples" / "assets"
SMALL = {"num_sequences": 6, "seq_len": 24, "tau": 0.3}


def weights_of(model):
    return {n: m.weight for n, m in model.named_modules() if hasattr(m, "weight_scale")}


def test_equals_calibrating_on_the_set_that_is_sampled_by_hand(tmp_path):
    model, by_hand = (tiny_model("qwen3_moe", tmp_path) for _ in range(2))
    said = []
    sink = logger.add(said.append, format="{message}", level="INFO")

    host(model=model, recipe=MoEQuantModifier(config_groups=int4(16), ebss=SMALL),
         processor=NoProcessor())  # fmt: skip
    data = ebss_dataset(by_hand, config=EBSSConfig(**SMALL))
    oneshot(by_hand, MoEQuantModifier(config_groups=int4(16)), data, batch_size=85)

    logger.remove(sink)
    assert any("the model writes its own, 6 sequences of 24 tokens" in line for line in said)
    theirs = weights_of(by_hand)
    assert len(theirs) == 2 * (4 + 4 * 3)
    for name, weight in weights_of(model).items():
        assert (weight == theirs[name]).float().mean() > 0.999, name  # ties of float32


def test_runs_beside_a_modifier_that_needs_no_data(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    attention = QuantizationModifier(scheme="FP8_DYNAMIC", targets=["re:.*self_attn.*_proj$"])
    groups = int4(16)
    groups["group_0"]["targets"] = ["re:.*experts.*_proj$"]
    ours = MoEQuantModifier(config_groups=groups, ebss=SMALL)

    host(model=model, recipe=[attention, ours], processor=NoProcessor())

    assert len(weights_of(model)) == 2 * (4 + 4 * 3)
    assert len(ours.record.linears) == 2 * 4 * 3


def test_a_recipe_written_without_data_still_takes_data(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path / "model")
    host(model=model, recipe=MoEQuantModifier(config_groups=int4(16), ebss=SMALL),
         processor=NoProcessor(), output_dir=str(tmp_path / "out"))  # fmt: skip
    again = tiny_model("qwen3_moe", tmp_path / "model")
    said = []
    sink = logger.add(said.append, format="{message}", level="INFO")

    oneshot(again, (tmp_path / "out" / "recipe.yaml").read_text())

    logger.remove(sink)
    assert not any("the model writes its own" in line for line in said)
    assert len(weights_of(again)) == 2 * (4 + 4 * 3)


def test_the_data_set_named_ebss_is_sampled_with_the_running_model():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_moe")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_moe", dtype=torch.float32)
    modifier = MoEQuantModifier(scheme="W4A16")

    host(model=model, tokenizer=tokenizer, recipe=modifier, dataset="ebss",
         num_calibration_samples=2, max_seq_length=16)  # fmt: skip

    attention = next(r for r in modifier.record.linears if r.name.endswith("q_proj"))
    assert attention.effective_tokens == 2 * 16


def test_a_dense_model_needs_a_data_set(tmp_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match="a model without experts: pass dataset="):
        host(model=model, recipe=MoEQuantModifier(config_groups=int4(16)), processor=NoProcessor())
