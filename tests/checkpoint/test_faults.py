"""Every planted fault is found, named by its check, and nothing else is said to be wrong."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    add_mtp_layer,
    copy_of,
    edited_config,
    edited_json,
    edited_tensors,
)
from helpers import int4

from moeq_plugin import verify_checkpoint

EXPERT = "model.layers.1.mlp.experts.2"
MIXTRAL_EXPERT = "model.layers.1.block_sparse_moe.experts.2"
ATTENTION = "model.layers.0.self_attn"
INDEX = "model.safetensors.index.json"
FAULTS: list["Fault"] = []


@dataclass(frozen=True)
class Fault:
    name: str
    damage: Callable[[Path], None]
    checks: set[str]  # all errors that are to be found, no more and no less
    where: str  # what the first of them has to name
    of: str = "qwen3_moe"
    verify: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 1


def fault(*checks, where, of="qwen3_moe", exit_code=1, **verify):
    """Plant what the decorated function does; its name says what it is."""

    def add(damage):
        name = damage.__name__.replace("_", " ").strip()
        FAULTS.append(Fault(name, damage, set(checks), where, of, verify, exit_code))
        return damage

    return add


def of_module(tensors, module):
    return {name.rpartition(".")[2]: name for name in tensors if name.startswith(f"{module}.")}


def edit(path, name, change):
    with edited_tensors(path) as tensors:
        tensors[name] = change(tensors[name])


def swap(path, one, other):
    with edited_tensors(path) as tensors:
        for name in [name for name in tensors if name.startswith(f"{one}.")]:
            twin = other + name.removeprefix(one)
            tensors[name], tensors[twin] = tensors[twin], tensors[name]


def requantize(path, module, group_size=None, num_bits=None, base=None):
    """Store a linear in another scheme, as another tool might have, with arbitrary codes."""
    with edited_tensors(path) as tensors:
        rows, columns = tensors[f"{module}.weight_shape"].tolist()
        bits = num_bits or 4
        generator = torch.Generator().manual_seed(len(module))
        words = torch.randint(
            -(1 << 31), 1 << 31, (rows, columns * bits // 32), generator=generator
        )
        tensors[f"{module}.weight_packed"] = words.int()
        groups = columns // (group_size or 16)
        tensors[f"{module}.weight_scale"] = torch.full((rows, groups), 0.01)


# numbers


@fault("zeroed", where=f"{EXPERT}.down_proj")
def zeroed_expert(path):
    # code 8 is the zero point of symmetric 4-bit weights
    edit(path, f"{EXPERT}.down_proj.weight_packed", lambda t: torch.full_like(t, -0x77777778))


@fault("zeroed", where=f"{EXPERT}.down_proj.weight", of="model")
def zeroed_expert_in_16_bit(path):
    edit(path, f"{EXPERT}.down_proj.weight", torch.zeros_like)


@fault("constant", where="model.embed_tokens.weight")
def constant_tensor(path):
    edit(path, "model.embed_tokens.weight", torch.ones_like)


@fault("constant", where=f"{EXPERT}.up_proj")
def constant_codes(path):
    edit(path, f"{EXPERT}.up_proj.weight_packed", lambda t: torch.full_like(t, 0x33333333))


@fault("saturated", where=f"{EXPERT}.up_proj")
def saturated_codes(path):
    def saturate(words):
        generator = torch.Generator().manual_seed(0)
        nibbles = torch.randint(0, 2, (*words.shape, 8), generator=generator) * 15
        return (nibbles << (torch.arange(8) * 4)).sum(-1).int()

    edit(path, f"{EXPERT}.up_proj.weight_packed", saturate)


def poke(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


@fault("non-finite", where=f"{EXPERT}.gate_proj.weight_scale")
def nan_scale(path):
    edit(path, f"{EXPERT}.gate_proj.weight_scale", poke(float("nan")))


@fault("non-finite", where="model.norm.weight")
def infinite_norm(path):
    edit(path, "model.norm.weight", poke(float("inf")))


@fault("scale-not-positive", where=f"{EXPERT}.gate_proj.weight_scale", of="asymmetric")
def negative_scale_beside_zero_points(path):
    edit(path, f"{EXPERT}.gate_proj.weight_scale", poke(-0.01))


@fault("scale-not-positive", where=f"{EXPERT}.gate_proj.weight_scale", of="8-bit floats")
def negative_scale_of_small_floats(path):
    edit(path, f"{EXPERT}.gate_proj.weight_scale", poke(-0.01))


@fault("scale-not-positive", where=f"{EXPERT}.gate_proj.input_scale", of="activations")
def negative_scale_of_activations(path):
    with edited_tensors(path) as tensors:
        tensors[f"{EXPERT}.gate_proj.input_scale"] = torch.tensor([-0.01])


@fault("scale-not-positive", where=f"{EXPERT}.gate_proj.weight_scale")
def denormal_scale(path):
    edit(path, f"{EXPERT}.gate_proj.weight_scale", poke(-1e-39))


@fault("scale-not-positive", where=f"{ATTENTION}.q_proj.weight_scale")
def zero_scale(path):
    edit(path, f"{ATTENTION}.q_proj.weight_scale", poke(0.0))


@fault("scale-not-positive", where=f"{EXPERT}.gate_proj.scales", of="GPTQ format")
def zero_scale_in_the_gptq_format(path):
    edit(path, f"{EXPERT}.gate_proj.scales", poke(0.0))


@fault("group-index", where=f"{EXPERT}.gate_proj.g_idx", of="GPTQ format")
def group_index_out_of_range(path):
    edit(path, f"{EXPERT}.gate_proj.g_idx", poke(99))


@fault("wrong-shape", where=f"{EXPERT}.gate_proj.weight_shape")
def stated_shape_of_another_weight(path):
    edit(path, f"{EXPERT}.gate_proj.weight_shape", lambda t: t * 2)


# against the source


@fault("swapped-expert", where=EXPERT, source=True)
def swapped_experts(path):
    swap(path, EXPERT, "model.layers.1.mlp.experts.3")


@fault("swapped-expert", where="mlp.experts", of="gpt_oss", source=True, target="gguf")
def swapped_experts_of_a_fused_source(path):
    swap(path, EXPERT, "model.layers.1.mlp.experts.3")


@fault("far-from-source", where=f"{EXPERT}.gate_proj", source=True)
def doubled_scales(path):
    edit(path, f"{EXPERT}.gate_proj.weight_scale", lambda t: t * 2)


@fault("far-from-source", where="model.layers.0.input_layernorm.weight", source=True)
def norm_of_another_layer(path):
    edit(path, "model.layers.0.input_layernorm.weight", lambda t: t * 1.5)


@fault("not-comparable", where="linears", source=True)
def weights_of_another_model(path):
    with edited_tensors(path) as tensors:
        for name in [name for name in tensors if name.endswith("weight_packed")]:
            tensors[name] = tensors[name].flip(0)


# tensors that are not as the config says


@fault("missing-zero-point", where=f"{EXPERT}.gate_proj.weight_zero_point", of="asymmetric")
def missing_zero_point(path):
    with edited_tensors(path) as tensors:
        del tensors[f"{EXPERT}.gate_proj.weight_zero_point"]


@fault("missing-expert", where=EXPERT)
def missing_expert(path):
    with edited_tensors(path) as tensors:
        for name in list(tensors):
            if name.startswith(f"{EXPERT}."):
                del tensors[name]


@fault("missing-tensor", where=f"{MIXTRAL_EXPERT}.w3", of="mixtral")
def missing_projection(path):
    with edited_tensors(path) as tensors:
        for name in of_module(tensors, f"{MIXTRAL_EXPERT}.w3").values():
            del tensors[name]


@fault("missing-tensor", where=f"{EXPERT}.up_proj.weight_scale")
def missing_scale(path):
    with edited_tensors(path) as tensors:
        del tensors[f"{EXPERT}.up_proj.weight_scale"]


@fault("missing-tensor", where="model.norm.weight")
def missing_norm(path):
    with edited_tensors(path) as tensors:
        del tensors["model.norm.weight"]


@fault("missing-router", where="model.layers.1.mlp.gate")
def missing_router(path):
    with edited_tensors(path) as tensors:
        del tensors["model.layers.1.mlp.gate.weight"]


@fault("missing-tensor", where="e_score_correction_bias", of="deepseek_v3")
def missing_router_bias(path):
    with edited_tensors(path) as tensors:
        del tensors["model.layers.1.mlp.gate.e_score_correction_bias"]


@fault("unexpected-tensor", where="model.layers.0.mlp.experts.4.gate_proj")
def config_with_fewer_experts(path):
    with edited_tensors(path) as tensors:
        for name in list(tensors):
            if ".experts.3." in name and "layers.0" in name:
                tensors[name.replace(".3.", ".4.")] = tensors[name].clone()


@fault("missing-expert", "wrong-shape", where="model.layers.0.mlp.experts.4")
def config_with_more_experts(path):
    with edited_config(path) as config:
        key = next(k for k in ("num_local_experts", "num_experts") if k in config)
        config[key] = 5


# 40 columns in two groups are no groups of 16 either
@fault("wrong-shape", "scheme-mismatch", "mixed-layer", where="experts")
def config_with_wider_experts(path):
    with edited_config(path) as config:
        config["moe_intermediate_size"] = 40


@fault("wrong-dtype", where=f"{EXPERT}.gate_proj.weight_packed")
def wrong_dtype_of_codes(path):
    edit(path, f"{EXPERT}.gate_proj.weight_packed", lambda t: t.long())


@fault("wrong-dtype", where=f"{ATTENTION}.q_proj.weight_scale")
def wrong_dtype_of_scales(path):
    edit(path, f"{ATTENTION}.q_proj.weight_scale", lambda t: t.double())


@fault("transposed", where="model.embed_tokens.weight")
def transposed_embedding(path):
    edit(path, "model.embed_tokens.weight", lambda t: t.T)


@fault("transposed", where=f"{EXPERT}.down_proj.weight", of="model")
def transposed_expert(path):
    edit(path, f"{EXPERT}.down_proj.weight", lambda t: t.T)


@fault("unexpected-tensor", where=f"{EXPERT}.gate_proj.weight_zero_point")
def zero_points_of_a_symmetric_scheme(path):
    with edited_tensors(path) as tensors:
        tensors[f"{EXPERT}.gate_proj.weight_zero_point"] = torch.zeros(4, 4, dtype=torch.int32)


@fault("old-packing", where=f"{MIXTRAL_EXPERT}.w1", of="3-bit")
def three_bits_padded_to_words(path):
    edit(
        path, f"{MIXTRAL_EXPERT}.w1.weight_packed", lambda t: torch.cat([t, t[:, :1]], dim=1)
    )  # 64 codes of 3 bits: 6 words packed densely, 7 with 10 codes in each


@fault("router-quantized", where="model.layers.0.mlp.gate")
def quantized_router(path):
    with edited_tensors(path) as tensors:
        del tensors["model.layers.0.mlp.gate.weight"]
        codes = tensors[f"{EXPERT}.gate_proj.weight_packed"][:4].clone()
        tensors["model.layers.0.mlp.gate.weight_packed"] = codes
        tensors["model.layers.0.mlp.gate.weight_scale"] = torch.ones(4, 4)
        tensors["model.layers.0.mlp.gate.weight_shape"] = torch.tensor([4, 64])
    with edited_config(path) as config:
        config["quantization_config"]["ignore"].remove("model.layers.0.mlp.gate")


# schemes


@fault("mixed-layer", "scheme-mismatch", where="model.layers.0.mlp.experts.0.gate_proj")
def expert_0_with_another_group_size(path):
    for projection in ("gate_proj", "up_proj"):
        requantize(path, f"model.layers.0.mlp.experts.0.{projection}", group_size=32)


# vLLM reads expert 1 in expert 0's scheme
@fault("mixed-layer", "scheme-mismatch", where="model.layers.0")
def an_expert_with_another_bit_width_declared(path):
    for projection in ("gate_proj", "up_proj", "down_proj"):
        requantize(path, f"model.layers.0.mlp.experts.1.{projection}", num_bits=8)
    with edited_config(path) as config:
        groups = config["quantization_config"]["config_groups"]
        groups["group_1"] = {
            **int4(16, num_bits=8)["group_0"],
            "targets": [r"re:.*layers\.0\.mlp\.experts\.1\..*"],
        }


@fault("scheme-mismatch", where="model.layers.1.mlp.experts", of="mixed")
def target_regex_without_mixtrals_own_names(path):
    with edited_config(path) as config:
        groups = config["quantization_config"]["config_groups"]
        groups["group_1"]["targets"] = [r"re:.*layers\.1\.mlp\.experts.*_proj$"]


def add_8_bit_group(path, target):
    """Let the config say that a part has 8 bits."""
    with edited_config(path) as config:
        config["quantization_config"]["config_groups"]["group_1"] = {
            **int4(16, num_bits=8)["group_0"],
            "targets": [target],
        }


@fault("mixed-fused-group", "mixed-layer", where="vLLM")
def gate_and_up_of_experts_with_different_schemes(path):
    for expert in range(4):
        requantize(path, f"model.layers.0.mlp.experts.{expert}.up_proj", num_bits=8)
    add_8_bit_group(path, r"re:.*layers\.0\.mlp\.experts\.\d+\.up_proj")


@fault("mixed-fused-group", "scheme-mismatch", where="gate_proj", of="qwen2_moe")
def gate_and_up_of_a_shared_expert_with_different_schemes(path):
    requantize(path, "model.layers.0.mlp.shared_expert.up_proj", group_size=32)


@fault("mixed-fused-group", "scheme-mismatch", where="self_attn")
def q_k_and_v_with_different_schemes(path):
    requantize(path, f"{ATTENTION}.k_proj", num_bits=8)
    add_8_bit_group(path, r"re:.*layers\.0\.self_attn\.k_proj")


@fault("mixed-fused-group", "scheme-mismatch", where="q_a_proj", of="deepseek_v2")
def latent_projections_with_different_schemes(path):
    requantize(path, f"{ATTENTION}.q_a_proj", group_size=32)


@fault("mixed-fused-group", where="vLLM")
def one_of_q_k_and_v_ignored(path):
    with edited_tensors(path) as tensors:
        for name in of_module(tensors, f"{ATTENTION}.k_proj").values():
            del tensors[name]
        generator = torch.Generator().manual_seed(0)
        tensors[f"{ATTENTION}.k_proj.weight"] = torch.randn(32, 64, generator=generator)
    with edited_config(path) as config:
        config["quantization_config"]["ignore"].append(f"{ATTENTION}.k_proj")


@fault("scheme-mismatch", where="experts")
def config_of_another_group_size(path):
    with edited_config(path) as config:
        groups = config["quantization_config"]["config_groups"]
        groups["group_0"]["weights"]["group_size"] = 32


@fault("scheme-mismatch", where="experts")
def config_of_another_bit_width(path):
    with edited_config(path) as config:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 8


@fault("lm-head-not-ignored", where="lm_head")
def output_embedding_neither_quantized_nor_ignored(path):
    with edited_config(path) as config:
        config["quantization_config"]["ignore"].remove("lm_head")


@fault("router-not-ignored", where="model.layers.0.mlp.gate")
def router_neither_quantized_nor_ignored(path):
    with edited_config(path) as config:
        config["quantization_config"]["ignore"].remove("model.layers.0.mlp.gate")


@fault("mtp-not-ignored", where="model.layers.2", of="deepseek_v3")
def next_token_layer_in_16_bit_but_not_ignored(path):
    add_mtp_layer(path, is_ignored=False)


@fault("missing-expert", where="model.layers.2.mlp.experts.1", of="next-token prediction")
def next_token_layer_without_an_expert(path):
    with edited_tensors(path) as tensors:
        for name in list(tensors):
            if name.startswith("model.layers.2.mlp.experts.1."):
                del tensors[name]


@fault("tp-indivisible", where="down_proj", tp=4)
def groups_that_straddle_ranks(path):
    """Nothing is damaged: 32 columns over 4 ranks are half a group each."""


@fault("tp-indivisible", where="attention", tp=8)
def heads_that_cannot_be_shared(path):
    """Nothing is damaged: 4 heads over 8 ranks."""


@fault("vllm-refuses", where="self_attn")
def activation_order_by_group(path):
    with edited_config(path) as config:
        groups = config["quantization_config"]["config_groups"]
        groups["group_0"]["weights"]["actorder"] = "group"


# the scales of its symmetric codes have both signs
@fault("vllm-refuses", "scale-not-positive", where="self_attn", of="GPTQ format")
def asymmetric_gptq_format(path):
    with edited_config(path) as config:
        config["quantization_config"]["sym"] = False


@fault("vllm-refuses", where="self_attn", of="GPTQ format")
def activation_order_of_the_gptq_format(path):
    with edited_config(path) as config:
        config["quantization_config"]["desc_act"] = True


@fault("scheme-mismatch", where="experts", of="GPTQ format")
def dynamic_rule_that_misses_the_experts_of_vllm(path):
    """With a dot at the end the pattern matches no layer's `...mlp.experts`."""
    with edited_tensors(path) as tensors:
        for name in [n for n in tensors if ".layers.1." in n and ".experts." in n]:
            if name.endswith((".scales", ".qzeros")):
                tensors[name] = tensors[name][::2]
            elif name.endswith(".g_idx"):
                tensors[name] = tensors[name] // 2
    with edited_config(path) as config:
        rule = {r"+:.*\.layers\.1\.mlp\.experts\..*": {"group_size": 32}}
        config["quantization_config"]["dynamic"] = rule


@fault("transformers-misreads", where="routed experts", of="mixed", target="transformers")
def layers_of_several_schemes_in_transformers(path):
    """Nothing is damaged: transformers applies one scheme to all experts."""


@fault("transformers-misreads", where="routed experts", of="mixtral", target="transformers")
def mixtral_experts_under_the_names_of_others(path):
    with edited_tensors(path) as tensors:
        for ours, theirs in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
            for name in [name for name in tensors if f".{ours}." in name]:
                tensors[name.replace(f".{ours}.", f".{theirs}.")] = tensors.pop(name)


@fault("transformers-misreads", where="routed experts", of="gpt_oss", target="transformers")
def gpt_oss_experts_one_by_one_in_transformers(path):
    """Nothing is damaged: there is no rule to read them."""


@fault("vllm-refuses", where="routed experts", of="gpt_oss")
def gpt_oss_experts_one_by_one_in_vllm(path):
    """Nothing is damaged: its loader skips what is not one tensor per layer."""


@fault("transformers-misreads", where="routed experts", of="asymmetric", target="transformers")
def zero_points_of_experts_in_transformers(path):
    """Nothing is damaged: they are not read."""


@fault("transformers-misreads", where="routed experts", of="activations", target="transformers")
def unpacked_experts_in_transformers(path):
    """Nothing is damaged: it looks for packed ones."""


@fault("vllm-refuses", where="experts", of="8-bit channels")
def integer_experts_that_are_not_packed_in_vllm(path):
    with edited_tensors(path) as tensors:
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            module = name.removesuffix(".weight_packed")
            words = tensors.pop(name).numpy().view("uint8").astype("int16") - 128
            tensors[f"{module}.weight"] = torch.from_numpy(words.astype("int8"))
            del tensors[f"{module}.weight_shape"]
    with edited_config(path) as config:
        config["quantization_config"]["config_groups"]["group_0"]["format"] = "int-quantized"


@fault("vllm-refuses", where="experts")
def experts_of_one_bit(path):
    for layer in (0, 1):
        for expert in range(4):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                module = f"model.layers.{layer}.mlp.experts.{expert}.{projection}"
                requantize(path, module, num_bits=1)
    with edited_config(path) as config:
        config["quantization_config"]["config_groups"]["group_1"] = {
            **int4(16, num_bits=1)["group_0"],
            "targets": [r"re:.*experts.*_proj$"],
        }


@fault("gguf-mixed", where="up_proj", target="gguf")
def experts_of_several_schemes_in_gguf(path):
    requantize(path, f"{EXPERT}.up_proj", num_bits=8)
    add_8_bit_group(path, r"re:.*layers\.1\.mlp\.experts\.2\.up_proj")


# files


@fault("truncated-file", where="model.safetensors", exit_code=2)
def truncated_file(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@fault("truncated-file", where="model-00002-of-00002.safetensors", of="shards", exit_code=2)
def truncated_shard(path):
    file = path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@fault("bad-header", where="model.safetensors", exit_code=2)
def truncated_header(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


@fault("missing-shard", where="model-00002-of-00002.safetensors", of="shards", exit_code=2)
def missing_shard(path):
    (path / "model-00002-of-00002.safetensors").unlink()


@fault("index-names-absent-tensor", where="model.layers.9.extra", of="shards")
def index_that_names_an_absent_tensor(path):
    with edited_json(path / INDEX) as index:
        index["weight_map"]["model.layers.9.extra"] = "model-00001-of-00002.safetensors"


@fault("not-in-index", where="model.norm.weight", of="shards")
def index_without_a_tensor(path):
    with edited_json(path / INDEX) as index:
        del index["weight_map"]["model.norm.weight"]


@fault("bad-index", where=INDEX, of="shards", exit_code=2)
def index_that_is_none(path):
    (path / INDEX).write_text("{}")


@fault("duplicate-tensor", where="model.norm.weight", of="shards")
def tensor_in_two_files(path):
    from safetensors.torch import load_file, save_file

    (path / INDEX).unlink()
    files = sorted(path.glob("*.safetensors"))
    holder = next(file for file in files if "model.norm.weight" in load_file(file))
    other = next(file for file in files if file != holder)
    more = {"model.norm.weight": load_file(holder)["model.norm.weight"]}
    save_file(load_file(other) | more, other)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(fault, sound, tmp_path):
    is_16_bit = fault.of == "model"
    original = sound("qwen3_moe" if is_16_bit else fault.of)
    path = copy_of(original.parent / "model" if is_16_bit else original, tmp_path / "out")
    arguments = dict(fault.verify)
    if arguments.pop("source", False):
        arguments["source"] = original.parent / "model"

    fault.damage(path)
    report = verify_checkpoint(path, **arguments)

    assert {found.check for found in report.errors} == fault.checks, list(report.lines())
    assert any(fault.where in found.where for found in report.errors)
    assert report.exit_code == fault.exit_code


def write_an_expert_twice(path):
    with edited_tensors(path) as tensors:
        for name in of_module(tensors, f"{EXPERT}.gate_proj").values():
            tensors[name] = tensors[name.replace(".experts.2.", ".experts.3.")].clone()


def raise_a_scale(path):
    edit(path, f"{EXPERT}.gate_proj.weight_scale", poke(1e6))


def declare_a_format_of_others(path):
    with edited_config(path) as config:
        for group in config["quantization_config"]["config_groups"].values():
            group["format"] = "nvfp4-pack-quantized"
            group["weights"] |= {"type": "float", "strategy": "tensor_group"}


def leave_alone(path):
    """Nothing is damaged: what the checkpoint is deserves a warning."""


WARNED = [
    ("an expert written twice", "qwen3_moe", write_an_expert_twice, "duplicate-expert"),
    ("a scale far from the others", "qwen3_moe", raise_a_scale, "scale-outlier"),
    ("a format that is not known here", "qwen3_moe", declare_a_format_of_others, "unknown-format"),
    ("next-token prediction dropped", "deepseek_v3", leave_alone, "mtp-dropped"),
    ("kernels for 3 bits", "3-bit", leave_alone, "vllm-kernel"),
    ("zero points in transformers", "asymmetric", leave_alone, "transformers-misreads"),
    ("activations in transformers", "activations", leave_alone, "transformers-misreads"),
]


@pytest.mark.parametrize(("name", "of", "damage", "check"), WARNED, ids=[w[0] for w in WARNED])
def test_what_the_target_copes_with_is_a_warning(name, of, damage, check, sound, tmp_path):
    path = copy_of(sound(of), tmp_path / "out")

    damage(path)
    report = verify_checkpoint(path)

    assert check in {found.check for found in report.findings}
    assert (report.errors, report.exit_code) == ([], 0)
