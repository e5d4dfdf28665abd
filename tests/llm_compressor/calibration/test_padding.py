"""Padding counts nowhere, in any of the host's pipelines, and the host stays as it was."""

import pytest
import torch
from helpers import int4, oneshot, tiny_model, tokens

pytest.importorskip("llmcompressor")

from datasets import Dataset
from llmcompressor.pipelines.cache import IntermediatesCache

from moeq_plugin import MoEQuantModifier
from moeq_plugin.records.run import RunRecord

LENGTH = 32
TOKENS = [20, 13, 32, 7]  # of each sequence
ROWS = [row[:n] for row, n in zip(tokens(len(TOKENS), LENGTH).tolist(), TOKENS, strict=True)]


def padded(side, rows=ROWS):
    """A data set whose rows are filled up with token 0, which experts would see and count."""
    ids, masks = [], []
    for row in rows:
        fill, real = [0] * (LENGTH - len(row)), [1] * len(row)
        ids.append(row + fill if side == "right" else fill + row)
        masks.append(real + fill if side == "right" else fill + real)
    return Dataset.from_dict({"input_ids": ids, "attention_mask": masks})


def run_record(directory, data, family="qwen3_moe", **arguments):
    recipe = MoEQuantModifier(config_groups=int4(16))
    model = tiny_model(family, directory / "model")
    oneshot(model, recipe, data, output_dir=str(directory / "out"), **arguments)
    (record,) = RunRecord.load(directory / "out")
    return {linear.name: linear for linear in record.linears}


PIPELINES = ["sequential", "basic", "independent"]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_padding_does_not_count_in_any_pipeline(pipeline, tmp_path):
    one_by_one = Dataset.from_dict({"input_ids": ROWS})  # where there is nothing to fill
    expected = run_record(tmp_path / "without", one_by_one, "qwen2_moe", pipeline=pipeline)

    found = run_record(
        tmp_path / "with", padded("right"), "qwen2_moe", batch_size=2, pipeline=pipeline
    )

    assert found["model.layers.1.self_attn.q_proj"].effective_tokens == sum(TOKENS)
    assert set(found) == set(expected)
    # later layers see what the first one gives with weights that were rounded, at ties either way
    first = {name for name in found if ".layers.0." in name}
    assert len(first) == 4 + 3 + 4 * 3
    for name in first:
        assert found[name].basis == expected[name].basis
        assert found[name].effective_tokens == pytest.approx(expected[name].effective_tokens)
        assert found[name].loss == pytest.approx(expected[name].loss, rel=1e-4)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_padding_is_known_where_the_host_hands_layers_no_mask(pipeline, tmp_path):
    """It traces Qwen3-MoE and Mixtral without one, so that a layer cannot tell."""
    found = run_record(tmp_path, padded("right"), batch_size=2, pipeline=pipeline)

    assert len(found) == 2 * (4 + 4 * 3)
    attention = [linear for name, linear in found.items() if "self_attn" in name]
    assert [linear.effective_tokens for linear in attention] == [sum(TOKENS)] * 2 * 4


def test_every_run_sees_its_own_masks_only(tmp_path):
    """The masks of a run are noted where the host caches batches, which all runs share."""
    first = run_record(tmp_path / "first", padded("right", ROWS[:2]), batch_size=2)
    second = run_record(tmp_path / "second", padded("right", ROWS[2:]), batch_size=2)

    counted = [of["model.layers.1.self_attn.q_proj"].effective_tokens for of in (first, second)]
    assert counted == [sum(TOKENS[:2]), sum(TOKENS[2:])]


@pytest.mark.parametrize("fails", [False, True])
def test_the_host_caches_batches_as_before_when_a_run_has_ended(fails, tmp_path):
    before = IntermediatesCache.from_dataloader
    model = tiny_model("qwen3_moe", tmp_path)
    if fails:
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight[3] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            oneshot(model, MoEQuantModifier(config_groups=int4(16)), padded("right"))
    else:
        oneshot(model, MoEQuantModifier(config_groups=int4(16)), padded("right"))

    after = IntermediatesCache.from_dataloader
    try:
        assert after == before
    finally:
        IntermediatesCache.from_dataloader = before  # one failure here is no failure elsewhere
