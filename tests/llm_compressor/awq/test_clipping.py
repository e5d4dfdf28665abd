"""Clipping lowers the error that the router weights."""

import pytest
from helpers import dataset, tiny_model

pytest.importorskip("llmcompressor")

from awq_smoothing import inputs_of, rounded, smooth, uneven_model, weighted_loss


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_clipping_lowers_the_weighted_loss_that_it_records(projection, tmp_path):
    plain, clipped = (uneven_model("qwen3_moe", tmp_path, num_hidden_layers=1) for _ in range(2))
    norm = "model.layers.0.post_attention_layernorm"
    before = plain.get_submodule(norm).weight.detach().clone()
    arguments = {"affinity_power": 4, "min_effective_tokens": 0, "symmetric": False}

    smooth(plain, dataset(16, 32), **arguments)
    record = smooth(clipped, dataset(16, 32), clip=True, **arguments)

    factors = plain.get_submodule(norm).weight.detach() / before
    assert (factors - 1).abs().max() > 0.1
    shares = []
    for e in range(4):
        name = f"model.layers.0.mlp.experts.{e}"
        rows, weights = inputs_of(plain.get_submodule(name), e, projection, factors=factors)
        ours, theirs = (
            m.get_submodule(f"{name}.{projection}").weight.detach() for m in (clipped, plain)
        )
        losses = [weighted_loss(rounded(w) - theirs, rows, weights**4) for w in (ours, theirs)]
        shares.append(losses[0] / losses[1])
        assert record.clipped[f"{name}.{projection}"] == pytest.approx(shares[-1], rel=1e-2)
    assert max(shares) <= 1.001 and min(shares) < 0.95


def test_queries_and_keys_are_not_clipped(tmp_path):
    record = smooth(tiny_model("deepseek_v3", tmp_path), clip=True)
    clipped = {name.rpartition(".")[2] for name in record.clipped}
    assert clipped == {"gate_proj", "up_proj", "down_proj", "o_proj"}
