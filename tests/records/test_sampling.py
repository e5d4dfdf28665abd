import dataclasses
import math

import pytest

from moeq_plugin.records.sampling import SamplingReport, distinct_ngrams, report_on_samples

NATURAL = [list(range(i, i + 40)) for i in range(6)]
REPEATED = [[1] + [i, 2] * 20 for i in range(6)]


def report(input_ids, **changes):
    given = {
        "nll": [1.0] * len(input_ids),
        "sequence_imbalance": [0.2, 0.4, 0.3, 0.3, 0.3, 0.3][: len(input_ids)],
        "layer_imbalance": [0.1, 0.3],
        "load": [[5, 9, 1, 3], [4, 4, 8, 2]],
        "starved": {},
        "texts": [],
        **changes,
    }
    return report_on_samples(input_ids, **given)


def test_numbers_are_those_of_the_whole_set():
    found = report(NATURAL, nll=[math.log(4)] * 6, texts=["word " * 200] * 6)
    assert found.num_sequences == found.unique_sequences == 6
    assert found.num_tokens == 240
    assert found.perplexity == pytest.approx(4)
    assert found.imbalance == pytest.approx(0.2)
    assert found.sequence_imbalance == pytest.approx(0.3)
    assert (found.min_load, found.median_load, found.max_load) == (1, 4, 9)
    assert len(found.samples) == 5
    assert {len(sample) for sample in found.samples} == {300}
    assert found.warnings == []


def test_perplexity_weights_sequences_by_the_tokens_they_predict():
    found = report([[1, 2], [1, 2, 3, 4]], nll=[0.0, math.log(2)])
    assert found.perplexity == pytest.approx(2 ** (3 / 4))


@pytest.mark.parametrize("texts", [[], ["a b c"] * 6], ids=["ids", "texts"])
def test_repetition_compresses_and_warns(texts):
    found = report(REPEATED, texts=texts)
    assert found.distinct_4gram < 0.2
    assert "repeats itself: median share of distinct 4-grams 0.0" in found.warnings[0]
    assert report(REPEATED).compression_ratio > report(NATURAL).compression_ratio


def test_copies_silent_experts_and_starved_ones_are_named():
    found = report([NATURAL[0], NATURAL[0], NATURAL[1]], load=[[0, 4]], starved={"mlp": [0]})
    assert found.warnings == [
        "1 of 3 sequences are copies of others; raise prefix_tokens",
        "at least one expert received no token of the sampled set",
        "1 experts did not reach min_expert_tokens: {'mlp': [0]}",
    ]


def test_summary_states_perplexity_and_imbalance():
    assert "perplexity 2.72, imbalance 0.2000 (a sequence 0.3000)" in report(NATURAL).summary()


def test_is_frozen():
    assert dataclasses.is_dataclass(SamplingReport)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report(NATURAL).perplexity = 1.0


@pytest.mark.parametrize(
    ("ids", "size", "share"),
    [([1, 2, 3, 4], 4, 1.0), ([1, 2, 3], 4, 1.0), ([1, 2, 1, 2, 1], 2, 0.5)],
    ids=["one", "none", "half"],
)
def test_distinct_ngrams(ids, size, share):
    assert distinct_ngrams(ids, size) == share


def test_refuses_an_empty_set():
    with pytest.raises(ValueError, match="at least one sequence to report on, got none"):
        report([])
