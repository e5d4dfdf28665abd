import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeq_plugin.core.names import (
    FUSED,
    InLayer,
    Place,
    canonical,
    expert_of,
    fused_with,
    in_layer,
    layer_of,
    mixtral,
    of_expert,
    place,
    pool_of,
    role_of,
)

OURS = ["model", "layers", "experts", "mlp", "self_attn", "gate_proj", "down_proj", "weight", "up"]
THEIRS = ["block_sparse_moe", "w1", "w2", "w3"]
NUMBERS = st.integers(0, 99_999).map(str)


def names(parts):
    part = st.sampled_from(parts) | NUMBERS
    return st.lists(part, min_size=1, max_size=8).map(".".join)


PROPERTY = settings(max_examples=300, deadline=None, derandomize=True)


@given(names(OURS))
@PROPERTY
def test_spelling_as_mixtral_does_and_back_gives_the_name(name):
    assert canonical(mixtral(name)) == name


@given(names(OURS + THEIRS))
@PROPERTY
def test_the_canonical_name_of_a_canonical_name_is_itself(name):
    assert canonical(canonical(name)) == canonical(name)


@given(names(OURS + THEIRS))
@PROPERTY
def test_spelling_moves_nothing(name):
    assert layer_of(canonical(name)) == layer_of(name)
    assert expert_of(canonical(name)) == expert_of(name)


@given(names(OURS + THEIRS))
@PROPERTY
def test_names_are_put_together_again_from_what_they_are_taken_apart_into(name):
    numbered, expert = in_layer(name), of_expert(name)
    if numbered is not None:
        assert f"{numbered.before}layers.{numbered.layer}.{numbered.rest}" == _plain(name)
    if expert is not None:
        dot = "." if expert.block else ""
        parts = f"{expert.block}{dot}experts.{expert.expert}.{expert.projection}"
        assert parts == _plain(name)


def _plain(name):
    return ".".join(str(int(part)) if part.isdigit() else part for part in name.split("."))


@given(names(OURS), st.integers(0, 99), st.integers(0, 99))
@PROPERTY
def test_experts_of_one_pool_differ_in_their_number_only(rest, one, other):
    of_one, of_other = f"m.experts.{one}.{rest}", f"m.experts.{other}.{rest}"
    assert pool_of(of_one) == pool_of(of_other) == f"m.experts.*.{rest}"
    assert role_of(of_one) == role_of(of_other)


@given(names([*OURS, *(part for parts in FUSED.values() for part in parts)]))
@PROPERTY
def test_what_is_fused_with_a_name_is_fused_with_that_name_again(name):
    together = fused_with(name)
    assert name in together
    assert {fused_with(other) for other in together} == {together}


def test_no_projection_becomes_a_part_of_two_matrices():
    parts = [part for parts in FUSED.values() for part in parts]
    assert len(parts) == len(set(parts))


def test_a_pool_is_one_projection_of_all_experts():
    assert pool_of("m.layers.3.mlp.experts.12.up_proj") == "m.layers.3.mlp.experts.*.up_proj"
    assert pool_of("m.layers.3.self_attn.q_proj") == "m.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.self_attn.q_proj", Place(12, None, "self_attn.q_proj")),
        ("model.layers.3.mlp.experts.17.down_proj", Place(3, 17, "experts.down_proj")),
        ("model.layers.3.block_sparse_moe.experts.0.w1", Place(3, 0, "experts.w1")),
        ("model.layers.3.mlp.shared_experts.up_proj", Place(3, None, "mlp.shared_experts.up_proj")),
        ("model.layers.3.mlp.shared_expert.up_proj", Place(3, None, "mlp.shared_expert.up_proj")),
        ("blocks.0.attention.key", Place(0, None, "attention.key")),
        ("lm_head", Place(None, None, "lm_head")),
    ],
)
def test_layer_expert_and_kind_are_read_from_the_name(name, expected):
    assert place(name) == expected


def test_shared_experts_are_no_routed_experts():
    assert of_expert("model.layers.3.mlp.shared_experts.0.up_proj") is None


def test_only_numbers_after_layers_are_decoder_layers_to_a_reader_of_files():
    assert layer_of("visual.blocks.40.attn.qkv") is None
    assert in_layer("layers.4.att.key") == InLayer("", 4, "att.key")


def test_numbers_that_no_model_has_are_none():
    assert layer_of(f"model.layers.{'9' * 5000}.mlp") is None
    assert expert_of(f"model.layers.1.mlp.experts.{'9' * 5000}.w1") is None


def test_reading_names_needs_the_standard_library_only():
    code = (
        "import sys; before = set(sys.modules); import moeq_plugin.core.names; "
        "found = {n.split('.')[0] for n in set(sys.modules) - before}; "
        "assert found <= sys.stdlib_module_names | {'moeq_plugin'}, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
