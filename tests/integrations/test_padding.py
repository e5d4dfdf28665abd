"""Masks are found in both of the host's pipelines, and left padding is warned of."""

import pytest
from helpers import int4, oneshot, tiny_model, tokens

pytest.importorskip("llmcompressor")

from datasets import Dataset
from loguru import logger

from moeq_plugin import MoEQuantModifier


def padded(side):
    fill = [0] * 12
    rows = tokens(4, 20).tolist()
    ids = [row + fill if side == "right" else fill + row for row in rows]
    mask = [[1] * 20 + fill if side == "right" else fill + [1] * 20] * 4
    return Dataset.from_dict({"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("pipeline", ["sequential", "basic", "independent"])
def test_padding_does_not_count_in_any_pipeline(pipeline, tmp_path):
    modifier = MoEQuantModifier(config_groups=int4(16))
    model = tiny_model("qwen3_moe", tmp_path)

    oneshot(model, modifier, padded("right"), batch_size=2, pipeline=pipeline)

    by_name = {record.name: record for record in modifier.record.linears}
    assert len(by_name) == 2 * (4 + 4 * 3)
    assert by_name["model.layers.1.self_attn.q_proj"].effective_tokens == 4 * 20


@pytest.mark.parametrize(("side", "warned"), [("left", True), ("right", False)])
def test_left_padding_is_warned_of(side, warned, tmp_path):
    said = []
    sink = logger.add(said.append, format="{message}", level="WARNING")

    modifier = MoEQuantModifier(config_groups=int4(16))
    oneshot(tiny_model("qwen3_moe", tmp_path), modifier, padded(side), batch_size=2)

    logger.remove(sink)
    assert any("padded on the left" in line for line in said) == warned
