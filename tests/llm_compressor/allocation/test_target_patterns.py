import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llmcompressor")

from moeq_plugin.integrations.llm_compressor.allocation.target_patterns import patterns

DENSE = ["self_attn.q_proj", "self_attn.o_proj", "mlp.shared_expert.up_proj"]
NAMES = [f"model.layers.{n}.{rest}" for n in (0, 1, 2, 10, 11) for rest in DENSE] + [
    f"model.layers.{n}.mlp.experts.{e}.{p}"
    for n in (1, 10, 11)
    for e in (0, 1, 10)
    for p in ("gate_proj", "up_proj", "down_proj")
]
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def in_vllm(name):
    """Mixtral's name of a module, as vLLM asks its config for it."""
    block, _, projection = name.rpartition(".")
    return f"{block.replace('.mlp.', '.block_sparse_moe.')}.{MIXTRAL[projection]}"


@given(st.lists(st.sampled_from(["A", "B", "C"]), min_size=len(NAMES), max_size=len(NAMES)))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_name_is_matched_by_its_own_patterns_only(options):
    rows = {}
    for name, option in zip(NAMES, options, strict=True):
        rows.setdefault(option, []).append(name)

    found = patterns(rows)

    for name, option in zip(NAMES, options, strict=True):
        spellings = [name] + ([in_vllm(name)] if ".experts." in name else [])
        for spelling in spellings:
            matching = {
                key
                for key, targets in found.items()
                for target in targets
                if re.match(target.removeprefix("re:"), spelling)
            }
            assert matching == {option}, spelling


def test_names_outside_of_numbered_layers_stay_names():
    assert patterns({"A": ["visual.proj"]}) == {"A": ["visual.proj"]}


def test_a_layer_of_one_scheme_needs_no_list_of_experts():
    names = [f"m.layers.3.mlp.experts.{e}.up_proj" for e in range(512)]

    (pattern,) = patterns({"A": names})["A"]

    matches = re.compile(pattern.removeprefix("re:")).match
    assert len(pattern) < 100
    assert all(matches(name) and matches(in_vllm(name)) for name in names)
    other = ["m.layers.13.mlp.experts.0.up_proj", "m.layers.3.mlp.experts.0.down_proj"]
    other += ["m.layers.3.mlp.shared_experts.up_proj", "m.layers.3.mlp.experts.0.up_proj.scale"]
    assert not any(matches(name) for name in other)
    assert patterns({"A": names[:2]})["A"] == [pattern], "the number of experts does not matter"


def test_a_layer_of_two_schemes_lists_the_experts_of_each():
    names = [f"m.layers.3.mlp.experts.{e}.up_proj" for e in range(12)]

    found = patterns({"A": names[:11], "B": names[11:]})

    for key, own in (("A", names[:11]), ("B", names[11:])):
        (pattern,) = found[key]
        assert [n for n in names if re.match(pattern.removeprefix("re:"), n)] == own
