"""No alarm: sound checkpoints of many families, programs, methods and odd but legal settings."""

import json

import pytest
import torch
from checkpoints import copy_of, edited_config, edited_tensors, shard, to_gptq
from helpers import FAMILIES, dataset, int4, oneshot, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from moeq_plugin import MoEQuantAWQModifier, MoEQuantModifier, verify_checkpoint
from moeq_plugin.checkpoint.overview import inspect_model
from moeq_plugin.records.run import RunRecord

pytest.importorskip("llmcompressor")

from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier

SAID = {"transformers-misreads", "vllm-kernel", "mtp-dropped", "not-comparable", "duplicate-expert"}
COMMON = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip
DENSE_FIRST = {
    **COMMON, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
NOT_IN_OUR_TABLE = {
    "granitemoe": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {**DENSE_FIRST, "head_dim": 16},
    "dots1": DENSE_FIRST,
    "ernie4_5_moe": {
        **COMMON, "moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2,
        "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
    },
    "phimoe": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "minimax": {
        **COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
        "layer_types": ["full_attention", "linear_attention"],
    },
    "qwen3_next": {
        **COMMON, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
        "head_dim": 16, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "num_hidden_layers": 4,
    },
    # an epsilon that is null, beside that of its norms
    "cohere2_moe": {
        **COMMON, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "num_shared_experts": 1, "prefix_dense_intermediate_size": 64, "intermediate_size": 32,
        "mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention"] * 2,
    },
    # linears of two rows
    "kimi_linear": {
        **DENSE_FIRST, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": None,
        "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "linear_head_dim": 32,
        "linear_num_heads": 2, "linear_conv_kernel_dim": 4, "num_experts": 4,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
}  # fmt: skip
KEPT = ["lm_head", r"re:.*\.gate$", r"re:.*router.*", r"re:.*shared_expert_gate$"]


def ours(**changes):
    return [MoEQuantModifier(**{"ignore": ["lm_head"], "config_groups": int4(16), **changes})]


def stock(**changes):
    return [GPTQModifier(**{"ignore": KEPT, "config_groups": int4(16), **changes})]


def nearest(**changes):
    return [QuantizationModifier(**{"ignore": KEPT, "config_groups": int4(16), **changes})]


def grid(num_bits, **changes):
    return {"config_groups": int4(**{"group_size": 16, "num_bits": num_bits, **changes})}


def mse(num_bits):
    groups = int4(16, num_bits=num_bits)
    groups["group_0"]["weights"]["observer"] = "mse"
    return {"config_groups": groups}


UNEVEN = {
    "coarse": {**int4(16, num_bits=2)["group_0"], "targets": ["re:.*experts.*"]},
    "fine": {**int4(16, num_bits=8)["group_0"], "targets": ["re:.*self_attn.*"]},
}
# name -> family, changes of its config, recipe, data
CASES = {
    **{f"stock GPTQ {family}": (family, {}, stock, None) for family in FAMILIES},
    **{f"stock nearest {family}": (family, {}, nearest, None) for family in ("mixtral", "olmoe")},
    **{
        f"{make.__name__} {bits} bit": ("qwen3_moe", {}, lambda m=make, b=bits: m(**grid(b)), None)
        for make in (ours, stock, nearest)
        for bits in (2, 3, 8)
    },
    **{
        f"MSE {bits} bit": ("qwen2_moe", {}, lambda b=bits: nearest(**mse(b)), None)
        for bits in (2, 3, 4)
    },
    **{
        f"asymmetric {bits} bit": (
            "olmoe", {}, lambda b=bits: ours(**grid(b, symmetric=False, group_size=32)), None,
        )
        for bits in (2, 3, 4, 8)
    },
    "channels": ("mixtral", {}, lambda: ours(**grid(4, group_size=None)), None),
    "asymmetric channels": (
        "mixtral", {}, lambda: stock(**grid(4, group_size=None, symmetric=False)), None,
    ),
    "act order": ("qwen3_moe", {}, lambda: stock(actorder="static"), None),
    "our act order": ("qwen3_moe", {}, lambda: ours(actorder="static"), None),
    **{
        f"few tokens {family}": (family, {}, ours, lambda: dataset(1, 4))
        for family in ("qwen3_moe", "deepseek_v3", "gpt_oss")
    },
    "tied": ("qwen3_moe", {"tie_word_embeddings": True}, ours, None),
    "scaled positions": (
        "qwen3_moe",
        {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0,
            "original_max_position_embeddings": 128,
        }},
        ours,
        None,
    ),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [0]}, ours, None),
    "attention alone": (
        "qwen2_moe", {}, lambda: ours(ignore=["lm_head", "re:.*mlp.*"]), None,
    ),
    "AWQ": ("qwen2_moe", {}, lambda: [MoEQuantAWQModifier(n_grid=4), *ours()], None),
    "AWQ of latent attention": (
        "deepseek_v2", {}, lambda: [MoEQuantAWQModifier(n_grid=4), *ours()], None,
    ),
    "corrected target": ("qwen3_moe", {}, lambda: ours(**grid(2), corrected_target=True), None),
    "fine codes that make up for coarse ones": (
        "qwen2_moe", {}, lambda: ours(config_groups=UNEVEN, corrected_target=True), None,
    ),
    "AWQ, corrected target": (
        "qwen2_moe", {},
        lambda: [MoEQuantAWQModifier(n_grid=4), *ours(**grid(3), corrected_target=True)], None,
    ),
    "REAP": (
        "mixtral", {}, lambda: [REAPPruningModifier(sparsity=0.5), *ours()], None,
    ),
    **{family: (family, NOT_IN_OUR_TABLE[family], ours, None) for family in NOT_IN_OUR_TABLE},
}  # fmt: skip


def random_model(family, directory, changes):
    if family in FAMILIES:
        return tiny_model(family, directory, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **changes), dtype=torch.float32
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Return model and checkpoint of a case, made when they are first asked for."""
    root, known = tmp_path_factory.mktemp("sound"), {}

    def get(name):
        if name not in known:
            family, changes, recipe, data = CASES[name]
            directory = root / str(len(known))
            model = random_model(family, directory / "model", changes)
            oneshot(model, recipe(), data() if data else None)
            model.save_pretrained(directory / "out")
            known[name] = directory
        return known[name]

    return get


def alarms(path, source):
    """Return what is said beyond what is true of sound checkpoints all the same."""
    found = verify_checkpoint(path, source, target="gguf").findings
    return [f for f in found if f.severity == "error" or f.check not in SAID]


@pytest.mark.parametrize("name", CASES)
def test_a_sound_checkpoint_gives_no_alarm(name, made):
    assert alarms(made(name) / "out", made(name) / "model") == []


VARIANTS = {
    "shards": shard,
    "GPTQ format": to_gptq,
    "16-bit tensors in bfloat16": lambda path: _in_dtype(path, torch.bfloat16),
    "16-bit tensors in float16": lambda path: _in_dtype(path, torch.float16),
    "no recipe": lambda path: (path / "recipe.yaml").unlink(missing_ok=True),
    "unknown keys": lambda path: _config(path, my_key=[1, 2], another={"a": None}),
    "index of one file": lambda path: _index(path),
}


def _in_dtype(path, dtype):
    with edited_tensors(path) as tensors:
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.to(dtype)


def _config(path, **changes):
    with edited_config(path) as config:
        config.update(changes)


def _index(path):
    with edited_tensors(path) as tensors:
        files = dict.fromkeys(tensors, "model.safetensors")
    index = {"metadata": {}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", VARIANTS)
def test_another_form_of_a_sound_checkpoint_gives_no_alarm(name, made, tmp_path):
    directory = made("stock GPTQ qwen3_moe")
    path = copy_of(directory / "out", tmp_path / "out")
    VARIANTS[name](path)
    assert alarms(path, directory / "model") == []


@pytest.mark.parametrize("family", ["glm4_moe", "dots1", "ernie4_5_moe"])
def test_a_dense_gate_is_no_router(family, made):
    roles = {f.check for f in verify_checkpoint(made(family) / "out").findings}
    assert not roles.intersection({"router-quantized", "scheme-mismatch", "router-rows"})
    assert inspect_model(made(family) / "out").num_moe_layers == 1


@pytest.mark.parametrize("family", ["granitemoe", "dots1"])
def test_all_say_the_same_of_experts_that_transformers_cannot_read(family, made):
    """What is lost where plain transformers loads it, the run has said, and a verification says."""
    path = made(family) / "out"
    _, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    is_lost = any("experts" in key or "_linear" in key for key in info["missing_keys"])

    assert is_lost == (family == "granitemoe")
    (record,) = RunRecord.load(path)
    assert is_lost == any("has no rule to read" in limit for limit in record.limits)
    found = verify_checkpoint(path, target="transformers").errors
    assert is_lost == any("has no rule to read" in finding.what for finding in found)
    assert is_lost == bool(inspect_model(path).readers["transformers"])


def test_tables_of_vectors_are_no_linears(made, tmp_path):
    path = copy_of(made("dots1") / "out", tmp_path / "out")
    with edited_tensors(path) as tensors:
        table = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
        tensors["model.vision.query_768.weight"] = table
        tensors["transformer.wte.weight"] = table * 2
    assert alarms(path, None) == []


@pytest.mark.parametrize("family", ["qwen4_exp_text", "step3p7_text", "t5gemma"])
def test_norms_that_add_one_may_be_zero(family, made, tmp_path):
    path = copy_of(made("dots1") / "out", tmp_path / "out")
    with edited_tensors(path) as tensors:
        tensors["model.norm.weight"] = torch.zeros(64)
    assert {f.check for f in alarms(path, None)} == {"zeroed"}
    with edited_config(path) as config:
        config["model_type"] = family
    assert alarms(path, None) == []


def test_damage_is_found_in_what_was_rescaled_or_rotated(made, tmp_path):
    """A recipe that names AWQ switches off the comparison of what it changes, and no more."""
    for suffix, change in (
        ("experts.1.gate_proj.weight_packed", lambda t: t.flip(0)),
        ("experts.1.down_proj.weight_scale", lambda t: t.roll(1, 0)),
        ("mlp.gate.weight", lambda t: t.flip(0)),
        ("embed_tokens.weight", lambda t: t * 1.01),
    ):
        path = copy_of(made("AWQ") / "out", tmp_path / suffix)
        with edited_tensors(path) as tensors:
            name = next(name for name in tensors if name.endswith(suffix))
            tensors[name] = change(tensors[name])
        checks = {f.check for f in alarms(path, made("AWQ") / "model")}
        assert checks & {"far-from-source", "swapped-expert"}, suffix
