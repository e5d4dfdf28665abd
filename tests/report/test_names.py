import pytest

from moeq_plugin.report.names import Place, place


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
