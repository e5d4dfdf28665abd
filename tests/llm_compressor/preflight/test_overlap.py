"""A weight is rounded once, or the run does not begin."""

import pytest
import torch
from helpers import dataset, int4, oneshot, tiny_model

pytest.importorskip("llmcompressor")

from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger

from moeq_plugin import MoEQuantModifier, RWKVQuantModifier

EXPERTS, ATTENTION = "re:.*mlp.experts.*", "re:.*self_attn.*"


def groups(target, num_bits=4):
    made = int4(16, num_bits=num_bits)
    made["group_0"]["targets"] = [target]
    return made


def ours(target, **more):
    return MoEQuantModifier(config_groups=groups(target), **more)


def stock(target, modifier=GPTQModifier):
    return modifier(config_groups=groups(target, 8), ignore=["lm_head", "re:.*gate$"])


OVERLAPPING = {
    "ours twice": lambda: [ours("Linear"), ours("Linear")],
    "all and some": lambda: [ours("Linear"), ours(EXPERTS)],
    "some and all": lambda: [ours(EXPERTS), ours("Linear")],
    "GPTQ before": lambda: [stock("Linear"), ours(EXPERTS)],
    "GPTQ after": lambda: [ours(EXPERTS), stock("Linear")],
    "rounding before": lambda: [stock("Linear", QuantizationModifier), ours(EXPERTS)],
    "rounding after": lambda: [ours(EXPERTS), stock("Linear", QuantizationModifier)],
    "budget": lambda: [
        MoEQuantModifier(bits_per_weight=6.0, options=["W4A16_G16", "W8A16_G16"]),
        stock(EXPERTS),
    ],
    "codebooks": lambda: [RWKVQuantModifier(), ours(EXPERTS)],
}
APART = {
    "ours": lambda: [ours(EXPERTS), ours(ATTENTION)],
    "ours by ignore": lambda: [ours("Linear", ignore=["lm_head", EXPERTS]), ours(EXPERTS)],
    "GPTQ": lambda: [stock(ATTENTION), ours(EXPERTS)],
    "rounding": lambda: [ours(EXPERTS), stock(ATTENTION, QuantizationModifier)],
    "a router by name": lambda: [ours("Linear"), ours("model.layers.0.mlp.gate")],
}


@pytest.mark.parametrize("recipe", OVERLAPPING)
def test_two_modifiers_that_cover_the_same_linears_are_refused(recipe, tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    with pytest.raises(
        ValueError, match=r"both quantize 24 modules.*layers\.0\.mlp\.experts\.0|32"
    ):
        oneshot(model, OVERLAPPING[recipe]())
    fresh = tiny_model("qwen3_moe", tmp_path)
    oneshot(fresh, ours("Linear"))
    oneshot(model, ours("Linear"))  # nothing was changed: as good as new
    theirs = dict(fresh.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("recipe", APART)
def test_modifiers_that_share_the_work_are_not(recipe, tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    oneshot(model, APART[recipe]())


def two_groups(first, second):
    return {**groups(first), "group_1": groups(second, 8)["group_0"]}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (EXPERTS, "re:.*down_proj"),
        ("Linear", "Linear"),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_two_schemes_with_equal_right_are_refused(first, second, tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    with pytest.raises(ValueError, match="config_groups group_0 and group_1 both target"):
        oneshot(model, MoEQuantModifier(config_groups=two_groups(first, second)))


@pytest.mark.parametrize(
    ("first", "second"),
    [("Linear", EXPERTS), (EXPERTS, ATTENTION), (ATTENTION, "model.layers.0.self_attn.q_proj")],
)
def test_a_narrower_target_is_an_exception_and_wins(first, second, tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    modifier = MoEQuantModifier(config_groups=two_groups(first, second))
    oneshot(model, modifier)
    narrow = second.removeprefix("re:.*").removesuffix(".*")
    bits = {r.name: r.scheme[:2] for r in modifier.record.linears}
    assert all(scheme == ("W8" if narrow in name else "W4") for name, scheme in bits.items())


def test_a_second_run_over_what_the_first_has_done_is_refused(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    oneshot(model, ours(EXPERTS))
    with pytest.raises(ValueError, match="24 of 32 targeted modules are quantized already"):
        oneshot(model, ours("Linear"))


def said_of(model, **recipe):
    said = []
    sink = logger.add(said.append, format="{message}", level="WARNING")
    try:
        oneshot(model, MoEQuantModifier(config_groups=int4(16), **recipe), dataset(2))
    finally:
        logger.remove(sink)
    return "".join(said)


def test_an_ignore_that_matches_nothing_is_named_with_what_is_near(tmp_path):
    said = said_of(tiny_model("qwen3_moe", tmp_path), ignore=["lm_head", "model.layers.0.mlp.gat"])
    assert "'model.layers.0.mlp.gat', did you mean" in said
    assert "model.layers.0.mlp.gate'" in said
    assert "'lm_head'" not in said


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ("model.layers.0.block_sparse_moe.experts.1.w2", "model.layers.0.mlp.experts.1.down_proj"),
        ("re:.*block_sparse_moe.experts.*", "re:.*mlp.experts.*"),
    ],
)
def test_an_ignore_in_the_names_of_the_checkpoint_is_told_in_those_of_the_model(
    given, ours, tmp_path
):
    said = said_of(tiny_model("mixtral", tmp_path), ignore=[given])
    assert f"{given!r} is spelled as in checkpoints, the model says {ours!r}" in said
