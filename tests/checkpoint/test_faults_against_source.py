"""Numbers that the source tells to be wrong, though nothing is wrong with them by themselves."""

import pytest
import torch
from checkpoints import edited_tensors
from planted import ATTENTION, EXPERT, Planted, assert_found, every, ids, tensor, tensors

FAR = ("far-from-source", "swapped-expert", "not-comparable")


def scaled(factor):
    return lambda t: t * factor


def roll(dim):
    return lambda t: t.roll(1, dim)


def kill_rows(step):
    def change(scale):
        scale[::step] = 1e-20
        return scale

    return change


def one_row(factor):
    def change(scale):
        scale[3] *= factor
        return scale

    return change


def one_group(factor):
    def change(scale):
        scale[:, 1] *= factor
        return scale

    return change


def more(words, by=0x11111111):
    """Add 1 to every 4-bit code or zero point that is not the highest, as far as words go."""
    nibbles = (words.long()[..., None] >> (torch.arange(8) * 4)) & 15
    nibbles = (nibbles + 1).clamp(max=15)
    return (nibbles << (torch.arange(8) * 4)).sum(-1).to(torch.int32)


def numbers(of, module, scale="weight_scale", packed="weight_packed"):
    """Return the ways in which one linear's numbers may be wrong."""
    scales, codes = f"{module}.{scale}", f"{module}.{packed}"
    changes = {
        "scales times 1.5": (scales, scaled(1.5)),
        "scales times 0.3": (scales, scaled(0.3)),
        "scales times 1.2": (scales, scaled(1.2)),
        "scales times 0.8": (scales, scaled(0.8)),
        "scales one row off": (scales, roll(0)),
        "every second row dead": (scales, kill_rows(2)),
        "every tenth row dead": (scales, kill_rows(10)),
        "a row three times": (scales, one_row(3)),
        "a row halved": (scales, one_row(0.4)),
        "codes one row off": (codes, roll(0)),
        "codes one word off": (codes, roll(1)),
        "codes upside down": (codes, lambda t: t.flip(0)),
    }
    for name, (where, change) in changes.items():
        yield Planted(f"{of}: {name}", tensor(where, change), FAR, of=of, source=True)


def flipped(where):
    def change(scale):
        scale[where] *= -1
        return scale

    return change


def signs(of, module, scale="weight_scale"):
    """Return the ways in which the signs of one linear's scales may be wrong."""
    changes = {
        "the sign of a row flipped": flipped(3),
        "the sign of one scale flipped": flipped((3, 0)),
        "the signs of a group of columns flipped": flipped((slice(None), -1)),
        "all signs flipped": flipped(slice(None)),
        "every second sign flipped": flipped(slice(None, None, 2)),
    }
    if of.startswith("signed"):
        changes["scales without their signs"] = torch.abs
    for name, change in changes.items():
        damage = tensor(f"{module}.{scale}", change)
        yield Planted(f"{of}: {name}", damage, FAR, of=of, source=True)


TWO = (EXPERT, EXPERT.replace(".2", ".3"))


def swap(*suffixes, of="gate_proj"):
    def on(found):
        for suffix in suffixes:
            one, other = (f"{expert}.{of}.{suffix}" for expert in TWO)
            found[one], found[other] = found[other], found[one]

    return tensors(on)


def gate_for_up(found):
    for suffix in ("weight_packed", "weight_scale"):
        one, other = (f"{EXPERT}.{p}.{suffix}" for p in ("gate_proj", "up_proj"))
        found[one], found[other] = found[other], found[one]


def swap_layers(found):
    for name in [name for name in found if name.startswith("model.layers.0.self_attn.")]:
        other = name.replace(".0.", ".1.", 1)
        found[name], found[other] = found[other], found[name]


def shift_heads(found):
    for suffix in ("weight_packed", "weight_scale"):
        name = f"{ATTENTION}.q_proj.{suffix}"
        found[name] = found[name].roll(16, 0)


def noise(size):
    def change(t):
        return t + size * t.std() * torch.randn(t.shape, generator=torch.Generator().manual_seed(0))

    return change


def one_element(t):
    t.view(-1)[3] += 1
    return t


def swapped_rows(t):
    t[[0, 1]] = t[[1, 0]]
    return t


DOWN, GATE = f"{EXPERT}.down_proj", f"{EXPERT}.gate_proj"
MIXTRAL = "model.layers.1.block_sparse_moe.experts.2.w1"
NUMBERS = [
    *numbers("qwen3_moe", GATE),
    *numbers("3-bit", MIXTRAL),
    *numbers("8-bit channels", f"{EXPERT}.down_proj"),
    *numbers("asymmetric", DOWN),
    *numbers("GPTQ format", GATE, "scales", "qweight"),
    *numbers("signed", GATE),
    *signs("qwen3_moe", GATE),
    *signs("signed", GATE),
    *signs("signed, 2 bit", MIXTRAL),
    *signs("signed, 8 bit", DOWN),
    *signs("signed, GPTQ format", GATE, "scales"),
    Planted(
        "a group of columns doubled", tensor(f"{GATE}.weight_scale", one_group(2)), FAR, source=True
    ),
    Planted("scales one group off", tensor(f"{GATE}.weight_scale", roll(1)), FAR, source=True),
    Planted("all scales halved", every("weight_scale", scaled(0.5)), FAR, source=True),
    Planted("all scales 1.3 times", every("weight_scale", scaled(1.3)), FAR, source=True),
    Planted("all codes up by 1", every("weight_packed", more), FAR, source=True),
    Planted("codes up by 1", tensor(f"{GATE}.weight_packed", more), FAR, source=True),
    Planted(
        "zero points up by 1", tensor(f"{DOWN}.weight_zero_point", more), FAR, "asymmetric", True
    ),
    Planted("all zero points up by 1", every("weight_zero_point", more), FAR, "asymmetric", True),
    Planted("scales of two experts swapped", swap("weight_scale"), FAR, source=True),
    Planted("codes of two experts swapped", swap("weight_packed"), FAR, source=True),
    Planted(
        "experts' down swapped",
        swap("weight_packed", "weight_scale", of="down_proj"),
        FAR,
        source=True,
    ),
    Planted("gate and up swapped", tensors(gate_for_up), FAR, source=True),
    Planted("attention of two layers swapped", tensors(swap_layers), FAR, source=True),
    Planted("a head off", tensors(shift_heads), FAR, source=True),
]
OTHERS = [
    Planted(name, tensor(where, change), FAR, of, True)
    for name, where, change, of in (
        ("router noise", "model.layers.0.mlp.gate.weight", noise(0.02), "qwen3_moe"),
        ("router rows swapped", "model.layers.0.mlp.gate.weight", swapped_rows, "qwen3_moe"),
        ("router element", "model.layers.0.mlp.gate.weight", one_element, "qwen3_moe"),
        ("router scaled", "model.layers.0.mlp.gate.weight", scaled(1.01), "olmoe"),
        (
            "router bias",
            "model.layers.1.mlp.gate.e_score_correction_bias",
            one_element,
            "deepseek_v3",
        ),
        ("router bias of GPT-OSS", "model.layers.1.mlp.router.bias", one_element, "gpt_oss"),
        ("norm scaled", "model.layers.1.input_layernorm.weight", scaled(1.1), "qwen3_moe"),
        ("norm element", "model.norm.weight", one_element, "qwen3_moe"),
        ("norm of queries", f"{ATTENTION}.q_norm.weight", one_element, "qwen3_moe"),
        ("norm of latent keys", f"{ATTENTION}.kv_a_layernorm.weight", one_element, "deepseek_v2"),
        ("embedding element", "model.embed_tokens.weight", one_element, "qwen3_moe"),
        ("embedding rows swapped", "model.embed_tokens.weight", swapped_rows, "qwen3_moe"),
        ("embedding rolled", "model.embed_tokens.weight", roll(0), "mixtral"),
        ("output embedding", "lm_head.weight", one_element, "qwen3_moe"),
        ("attention bias", f"{ATTENTION}.q_proj.bias", one_element, "qwen2_moe"),
        ("expert bias", f"{EXPERT}.up_proj.bias", one_element, "gpt_oss"),
        ("sinks", f"{ATTENTION}.sinks", one_element, "gpt_oss"),
        ("shared gate", "model.layers.0.mlp.shared_expert_gate.weight", one_element, "qwen2_moe"),
        (
            "shared expert",
            "model.layers.1.mlp.shared_experts.up_proj.weight_scale",
            scaled(2),
            "deepseek_v3",
        ),
        (
            "16-bit expert",
            "model.layers.1.mlp.experts.0.up_proj.weight",
            one_element,
            "a layer in 16 bit",
        ),
    )
]


@pytest.mark.parametrize("fault", [*NUMBERS, *OTHERS], ids=ids([*NUMBERS, *OTHERS]))
def test_what_is_not_the_sources_is_found(fault, sound, tmp_path):
    if fault.target == "vllm" and fault.of == "gpt_oss":
        fault = Planted(fault.name, fault.damage, fault.checks, fault.of, True, "gguf")
    assert_found(fault, sound, tmp_path)


def test_tensors_that_only_the_source_has_are_named_once_for_each_kind(sound, tmp_path):
    from checkpoints import copy_of

    from moeq_plugin import verify_checkpoint

    model = copy_of(sound("qwen3_moe").parent / "model", tmp_path / "model")
    with edited_tensors(model) as found:
        for block in range(7):
            found[f"model.visual.blocks.{block}.attn.qkv.weight"] = torch.randn(8, 8)
        found["model.visual.merger.norm.weight"] = torch.ones(8)
    report = verify_checkpoint(sound("qwen3_moe"), model)
    lost = [found for found in report.errors if found.check == "not-in-checkpoint"]
    assert [found.what for found in lost] == [
        "the source has it, and 6 more like it",
        "the source has it",
    ]
