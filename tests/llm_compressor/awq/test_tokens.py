"""AWQ for experts that hardly any token reaches, and for tokens that are padding."""

import pytest
import torch
from helpers import tiny_model, tokens

pytest.importorskip("llmcompressor")

from awq_smoothing import (
    SEARCH,
    candidates,
    inputs_of,
    linearized,
    smooth,
    starve,
    weighted_loss,
)
from datasets import Dataset
from loguru import logger

from moeq_plugin.records.run import Basis


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_starved_expert_is_named_and_unharmed(family, tmp_path):
    model, original = (tiny_model(family, tmp_path) for _ in range(2))
    starve(model, [0, 1])
    starve(original, [0, 1])
    said = []
    sink = logger.add(said.append, format="{message}", level="WARNING")

    record = smooth(model, clip=True)

    logger.remove(sink)
    starved = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(2) for e in (2, 3)]
    for name in starved:
        assert record.smoothed[name]["basis"] is Basis.LAYER
        assert record.smoothed[name]["effective_tokens"] == 0
        assert any(name in line for line in said)
        expert = model.get_submodule(name.rpartition(".")[0])
        # each weight still does something: clamping moves outliers, it zeroes nothing
        weights = [p for n, p in expert.named_parameters() if n.endswith(".weight")]
        assert all((weight != 0).all() and weight.isfinite().all() for weight in weights)
    assert f"{len(starved)} on the layer's alone" in record.summary(0)


def test_a_starved_expert_gets_what_all_tokens_of_its_layer_would_give(tmp_path):
    model = tiny_model("mixtral", tmp_path, num_hidden_layers=1)
    expert = linearized("mixtral", tmp_path, num_hidden_layers=1).model.layers[0].mlp.experts[2]
    starve(model, [0, 1])

    record = smooth(model, **SEARCH)

    down = expert.down_proj.weight.detach()
    rows, ones = inputs_of(expert, 2, "down_proj", all_tokens=True)
    rms = rows.square().mean(0).sqrt()
    least, best = min(
        ((weighted_loss(change, rows, ones), scales) for scales, change in
         candidates(down, rows, rms)), key=lambda x: x[0],
    )  # fmt: skip
    smoothed = model.model.layers[0].mlp.experts[2].down_proj.weight.detach()
    torch.testing.assert_close(smoothed, down * best, rtol=1e-3, atol=1e-6)
    of = record.smoothed["model.layers.0.mlp.experts.2.up_proj"]
    assert of["loss"] == pytest.approx(least / len(down) / len(rows), rel=1e-3)


def test_one_token_is_mixed_with_the_layer(tmp_path):
    model = tiny_model("mixtral", tmp_path)
    record = smooth(model, Dataset.from_dict({"input_ids": [[5]]}))
    bases = [of["basis"] for name, of in record.smoothed.items() if "experts" in name]
    assert bases.count(Basis.SHRUNK) == bases.count(Basis.LAYER) == 2 * 2


def test_a_batch_that_is_all_padding_changes_nothing(tmp_path):
    model, original = (tiny_model("qwen3_moe", tmp_path) for _ in range(2))
    data = Dataset.from_dict({"input_ids": [[1] * 8], "attention_mask": [[0] * 8]})

    record = smooth(model, data, clip=True)

    ids = tokens(1, 16)
    torch.testing.assert_close(model(ids).logits, original(ids).logits)
    assert not record.smoothed and not record.clipped
    assert "no token reached it" in record.left_out.values()


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_padding_counts_nowhere(pipeline, tmp_path):
    model, unpadded = (tiny_model("qwen2_moe", tmp_path, num_hidden_layers=1) for _ in range(2))
    rows = tokens(6, 20).tolist()
    fill = [7] * 12  # a token that does occur
    data = Dataset.from_dict(
        {
            "input_ids": [row + fill for row in rows],
            "attention_mask": [[1] * len(row) + [0] * len(fill) for row in rows],
        }
    )

    first = smooth(model, data, clip=True, pipeline=pipeline)
    second = smooth(unpadded, Dataset.from_dict({"input_ids": rows}), clip=True, pipeline=pipeline)

    assert first.smoothed.keys() == second.smoothed.keys()
    for name, of in first.smoothed.items():
        assert of["loss"] == pytest.approx(second.smoothed[name]["loss"], rel=1e-3)
    for name, share in first.clipped.items():
        assert share == pytest.approx(second.clipped[name], rel=1e-2)
