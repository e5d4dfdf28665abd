import pytest
from torch import nn

from moeq_plugin.core.names import FUSED

pytest.importorskip("llmcompressor")

from moeq_plugin.integrations.llm_compressor.rwkv.scheme_choice import deciding_together


@pytest.mark.parametrize("projections", FUSED.values(), ids=FUSED)
def test_what_a_server_loads_as_one_matrix_gets_one_scheme(projections):
    names = [f"model.layers.{n}.self_attn.{p}" for n in (0, 1) for p in (*projections, "o_proj")]
    linears = {name: nn.Linear(2, 2) for name in names}

    groups = [set(group) for group in deciding_together(linears, [])]

    for layer in (0, 1):
        assert {f"model.layers.{layer}.self_attn.{p}" for p in projections} in groups


def test_a_projection_without_its_siblings_decides_alone():
    groups = deciding_together(
        {"a.kv_a_proj_with_mqa": nn.Linear(2, 2), "a.q_proj": nn.Linear(2, 2)}, []
    )
    assert all(len(group) == 1 for group in groups)
