"""Configs that compute something else than the source's, or nothing at all."""

import pytest
from checkpoints import edited_config
from planted import Planted, assert_found, config, group, ids, section


def rope(**changes):
    def damage(path):
        with edited_config(path) as content:
            content["rope_parameters"] = {**content.get("rope_parameters", {}), **changes}

    return damage


def planted(of, source, check, **damages):
    return [
        Planted(f"{of}: {name.replace('_', ' ')}", damage, (check,), of, source)
        for name, damage in damages.items()
    ]


CHANGED = [
    *planted(
        "qwen3_moe",
        True,
        "config-change",
        epsilon=config(rms_norm_eps=1e-5),
        normalized_top_k=config(norm_topk_prob=False),
        normalized_top_k_left_out=config(norm_topk_prob=...),
        top_k=config(num_experts_per_tok=1),
        top_k_of_all=config(num_experts_per_tok=4),
        activation=config(hidden_act="relu"),
        activation_left_out=config(hidden_act="gelu"),
        theta=rope(rope_theta=5e5),
        theta_of_old_configs=config(rope_parameters=..., rope_theta=1e6),
        scaled_positions=rope(rope_type="linear", factor=2.0),
        old_scaling=config(rope_scaling={"type": "yarn", "factor": 4.0}),
        window=config(sliding_window=16, use_sliding_window=True),
        positions=config(max_position_embeddings=64),
        class_of_another=config(architectures=["Qwen2MoeForCausalLM"]),
        begin=config(bos_token_id=5),
        end=config(eos_token_id=7),
        sparse_step=config(mlp_only_layers=[9]),
    ),
    *planted(
        "deepseek_v3",
        True,
        "config-change",
        scaling_of_experts=config(routed_scaling_factor=1.0),
        scaling_of_experts_left_out=config(routed_scaling_factor=3.0),
        groups=config(n_group=1),
        chosen_groups=config(topk_group=2),
        interleaving=config(rope_interleave=False),
        normalized_top_k=config(norm_topk_prob=False),
    ),
    *planted("gpt_oss", True, "config-change", window=config(sliding_window=64)),
    *planted(
        "mixtral",
        True,
        "config-change",
        epsilon=config(rms_norm_eps=1.0),
        window=config(sliding_window=4),
    ),
    *planted("olmoe", True, "config-change", clipping=config(clip_qkv=0.1)),
    *planted(
        "deepseek_v2", True, "config-change", method=config(topk_method="group_limited_greedy")
    ),
]
IMPOSSIBLE = [
    *planted(
        "qwen3_moe",
        False,
        "config-value",
        more_experts_than_there_are=config(num_experts_per_tok=99),
        kind_of_rope=rope(rope_type="banana"),
        rope_without_its_factor=rope(rope_type="yarn"),
        longrope_without_factors=rope(rope_type="longrope"),
        negative_theta=rope(rope_theta=-1.0),
        infinite_theta=rope(rope_theta=float("inf")),
        rope_that_is_none=config(rope_parameters=3),
        no_epsilon=config(rms_norm_eps=float("nan")),
        negative_epsilon=config(rms_norm_eps=-1e-6),
        large_epsilon=config(rms_norm_eps=1.0),
        epsilon_in_words=config(rms_norm_eps="1e-6"),
        activation=config(hidden_act="banana"),
        activation_that_is_none=config(hidden_act=["silu"]),
        heads=config(num_key_value_heads=3),
        padding=config(pad_token_id=9999),
        positions=config(max_position_embeddings=0),
        window=config(sliding_window=-4),
        dtype=config(dtype="float12"),
        layer_types=config(layer_types=["full_attention"]),
        kind_of_layer=config(layer_types=["banana", "banana"]),
    ),
    *planted(
        "deepseek_v3",
        False,
        "config-value",
        groups_that_do_not_divide=config(n_group=3),
        more_groups_than_there_are=config(topk_group=3),
        no_scaling=config(routed_scaling_factor=0.0),
        scaling_of_nan=config(routed_scaling_factor=float("nan")),
    ),
    Planted(
        "deepseek_v3: groups too small for the experts asked for",
        config(n_group=4, topk_group=1),
        ("config-value",),
        "deepseek_v3",
    ),
]
SECTIONS = [
    Planted(
        "cache without scales",
        section(kv_cache_scheme={"num_bits": 8, "type": "float", "dynamic": False}),
        ("missing-scale",),
    ),
    Planted("cache that is none", section(kv_cache_scheme=3), ("section",)),
    Planted(
        "static inputs",
        group(input_activations={"num_bits": 8, "dynamic": False}),
        ("missing-scale",),
    ),
    Planted("frozen", section(quantization_status="frozen"), ("not-compressed",)),
    Planted("initialized", section(quantization_status="initialized"), ("not-compressed",)),
    Planted("dense", section(format="dense"), ("not-compressed",)),
    Planted("sparse", section(sparsity_config={"format": "sparse-24-bitmask"}), ("section",)),
    Planted("weights of floats", lambda path: _weights(path, type="float"), ("section",)),
    Planted("dynamic weights", lambda path: _weights(path, dynamic=True), ("section",)),
    Planted(
        "asymmetric",
        lambda path: _weights(path, symmetric=False),
        ("missing-zero-point", "scheme-mismatch"),
    ),
    Planted("one target twice", lambda path: _twice(path), ("section",)),
    Planted("another format", group(format="float-quantized"), ("section", "scheme-mismatch")),
]


def _weights(path, **changes):
    with edited_config(path) as content:
        content["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)


def _twice(path):
    with edited_config(path) as content:
        groups = content["quantization_config"]["config_groups"]
        groups["group_1"] = groups["group_0"]


@pytest.mark.parametrize("fault", CHANGED, ids=ids(CHANGED))
def test_a_key_that_changes_the_computation_is_named(fault, sound, tmp_path):
    assert_found(fault, sound, tmp_path)


@pytest.mark.parametrize("fault", IMPOSSIBLE, ids=ids(IMPOSSIBLE))
def test_a_value_that_cannot_run_is_found_without_a_source(fault, sound, tmp_path):
    assert_found(fault, sound, tmp_path)


@pytest.mark.parametrize("fault", SECTIONS, ids=ids(SECTIONS))
def test_a_section_that_describes_something_else_is_found(fault, sound, tmp_path):
    assert_found(fault, sound, tmp_path)


def test_a_changed_key_is_told_with_both_values(sound, tmp_path):
    from checkpoints import copy_of

    from moeq_plugin import verify_checkpoint

    path = copy_of(sound("qwen3_moe"), tmp_path / "out")
    config(rms_norm_eps=1e-5)(path)
    (found,) = verify_checkpoint(path, sound("qwen3_moe").parent / "model").errors
    assert (found.where, found.what) == (
        "config.json: rms_norm_eps",
        "1e-05, in the source 1e-06",
    )


@pytest.mark.parametrize(
    "change",
    [
        config(transformers_version="4.0.0", torch_dtype="bfloat16", dtype=...),
        config(use_cache=False, attention_dropout=0.1, router_aux_loss_coef=0.5),
        config(pad_token_id=3),
        config(rope_parameters=..., rope_theta=10000.0, rope_scaling=None),
        config(attention_bias=..., use_sliding_window=..., decoder_sparse_step=...),
        config(_name_or_path="elsewhere", something_new=7),
    ],
)
def test_what_changes_nothing_is_no_alarm(change, sound, tmp_path):
    from checkpoints import copy_of

    from moeq_plugin import verify_checkpoint

    path = copy_of(sound("qwen3_moe"), tmp_path / "out")
    change(path)
    assert verify_checkpoint(path, sound("qwen3_moe").parent / "model").findings == ()


def test_the_defaults_of_known_families_are_those_of_transformers():
    from transformers import AutoConfig

    from moeq_plugin.checkpoint.config_defaults import CONFIG_DEFAULTS

    for family, defaults in CONFIG_DEFAULTS.items():
        theirs = AutoConfig.for_model(family).to_dict()
        theirs["rope_theta"] = theirs["rope_parameters"]["rope_theta"]
        assert {key: theirs[key] for key in defaults} == defaults
