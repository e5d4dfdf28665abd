"""Blocks that treat every token by itself see the same tokens in fewer batches."""

import pytest
import torch
from helpers import dataset, int4, oneshot, tiny_model

pytest.importorskip("llmcompressor")

from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.pipelines.cache import IntermediatesCache

from moeq_plugin import MoEQuantAWQModifier
from moeq_plugin.integrations.llm_compressor.awq import batches as module
from moeq_plugin.integrations.llm_compressor.awq import search
from moeq_plugin.integrations.llm_compressor.awq.batches import merged


def cache_of(calls):
    cache = IntermediatesCache(None, None)
    for arguments in calls:
        cache.append(arguments)
    return cache


def test_every_token_that_is_no_padding_stays_in_its_order():
    rng = torch.Generator().manual_seed(0)
    hidden = [torch.randn(2, 1500, 4, generator=rng) for _ in range(5)]
    masks = [None, *(torch.rand(2, 1500, generator=rng) < 0.9 for _ in range(4))]

    larger = merged(cache_of([{"hidden_states": rows} for rows in hidden]), masks)

    batches = [batch["hidden_states"] for batch in larger]
    assert [len(batch) for batch in batches] == [1, 1]
    assert batches[0].shape[1] >= module._TOKENS > batches[1].shape[1]
    kept = [
        rows.flatten(0, 1) if m is None else rows[m] for rows, m in zip(hidden, masks, strict=True)
    ]
    torch.testing.assert_close(torch.cat(batches, 1)[0], torch.cat(kept), rtol=0, atol=0)


def test_a_block_that_is_called_with_more_is_left_alone():
    rows = torch.ones(1, 3, 4)
    assert merged(cache_of([{"hidden_states": rows, "position_ids": rows}]), []) is None


def test_nothing_but_padding_is_left_alone():
    cache = cache_of([{"hidden_states": torch.ones(1, 3, 4)}])
    assert merged(cache, [torch.zeros(1, 3)]) is None


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_the_size_of_batches_does_not_matter(family, monkeypatch, tmp_path):
    sizes = []

    def spy(cache, masks):
        larger = merged(cache, masks)
        sizes.append((len(cache), len(larger)))
        return larger

    losses = []
    for merge in (spy, lambda *_: None):
        monkeypatch.setattr(search, "merged", merge)
        awq = MoEQuantAWQModifier(n_grid=4)
        rounding = QuantizationModifier(config_groups=int4(16, symmetric=False), ignore=["lm_head"])
        oneshot(tiny_model(family, tmp_path), [awq, rounding], dataset(6))
        losses.append({name: of["loss"] for name, of in awq.record.smoothed.items()})
    assert set(sizes) == {(6, 1)}
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
