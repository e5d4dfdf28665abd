from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("llmcompressor")

from moeq_plugin.integrations.llm_compressor.calibration.data_split import Part
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch


def watch_of(*batches):
    watch = PaddingWatch(SimpleNamespace(current_batch_idx=0))
    watch.batches = list(batches)
    return watch


def batch(sequences, length=3, **more):
    return {"input_ids": torch.ones(sequences, length, dtype=torch.int64), **more}


def kept(watch, part):
    rows = []
    for index, of_batch in enumerate(watch.batches):
        watch._state.current_batch_idx = index
        rows.append(part.keep(of_batch["input_ids"].numel()))
    return torch.cat(rows)


def test_halves_are_disjoint_and_miss_nothing_whatever_the_batches():
    watch = watch_of(batch(3), batch(1), batch(2))

    first, second = (kept(watch, Part(watch, half)) for half in (0, 1))

    assert (first ^ second).all()
    assert (
        first.tolist()
        == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3
    )


def test_every_domain_is_halved_by_itself():
    """Domains that take turns would otherwise fall into one half each."""
    domains = torch.tensor([0, 1, 0, 1])
    watch = watch_of(batch(4, 1, domain=domains), batch(4, 1, domain=domains))

    parts = {(h, d): kept(watch, Part(watch, h, d)) for h in (0, 1) for d in (0, 1)}

    assert torch.stack(list(parts.values())).sum(0).tolist() == [1] * 8
    assert [int(part.sum()) for part in parts.values()] == [2] * 4
    assert [int(Part(watch, 0, d).num_tokens) for d in (0, 1)] == [2, 2]


def test_padding_belongs_to_no_part():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    watch = watch_of(batch(2, attention_mask=mask))

    assert kept(watch, Part(watch, 0)).tolist() == [True, True, False, False, False, False]
    assert Part(watch, 1).num_tokens == 1


def test_rows_of_another_number_are_not_told_apart():
    watch = watch_of(batch(2))
    assert Part(watch, 0).keep(5) is None
