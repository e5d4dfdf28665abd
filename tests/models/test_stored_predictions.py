"""A comparison with kept predictions is that with the model, as far as was kept."""

import math

import pytest
import torch
from torch import nn

from moeq_plugin.models.evaluation import evaluate
from moeq_plugin.models.stored_predictions import compare_with, predict

VOCABULARY = 40


class Table(nn.Module):
    """Predicts from the last token alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.logits = nn.Parameter(3 * torch.randn(VOCABULARY, VOCABULARY))

    def forward(self, input_ids):
        return type("Output", (), {"logits": self.logits[input_ids]})


IDS = torch.randint(0, VOCABULARY, (6, 300), generator=torch.Generator().manual_seed(0)).split(4)


def test_with_the_whole_vocabulary_it_is_the_comparison_side_by_side():
    reference, model = Table(0), Table(1)
    exact = evaluate(model, reference, IDS)
    found = compare_with(predict(reference, IDS, VOCABULARY), model, IDS)
    for name, value in vars(exact).items():
        if name != "routing":
            assert getattr(found, name) == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_a_partition_never_sees_more_and_in_the_end_all():
    reference, model = Table(0), Table(1)
    exact = evaluate(model, reference, IDS)
    kept = [compare_with(predict(reference, IDS, k, 1), model, IDS) for k in (1, 4, 16, 39)]
    divergences = [found.kl for found in kept]
    assert divergences == sorted(divergences)
    assert divergences[0] > 0 and divergences[-1] <= exact.kl * (1 + 1e-5)
    # one token in the rest is no partition any more
    assert divergences[-1] == pytest.approx(exact.kl, rel=1e-5)
    for found in kept:  # these need nothing of the rest
        assert found.nll_change == pytest.approx(exact.nll_change, rel=1e-5)
        assert found.top1_agreement == exact.top1_agreement


def test_more_groups_see_more():
    reference, model = Table(0), Table(1)
    exact = evaluate(model, reference, IDS)
    kept = [compare_with(predict(reference, IDS, 2, g), model, IDS).kl for g in (1, 2, 10, 40)]
    assert kept == sorted(kept)  # each divides the one before
    assert kept[-1] == pytest.approx(exact.kl, rel=1e-5)


def test_the_kl_is_that_of_a_loop_over_tokens():
    reference, model = Table(0), Table(1)
    stored = predict(reference, IDS, 5, 7)
    total = []
    for row in torch.cat(IDS):
        for token in row[:-1]:
            p = reference.logits[token].double().softmax(0).tolist()
            q = model.logits[token].double().softmax(0).tolist()
            best = sorted(range(VOCABULARY), key=lambda i: -p[i])[:5]
            kl = sum(p[i] * math.log(p[i] / q[i]) for i in best)
            for group in range(7):
                others = [i for i in range(group, VOCABULARY, 7) if i not in best]
                theirs, ours = (sum(x[i] for i in others) for x in (p, q))
                kl += theirs * math.log(theirs / ours) if theirs else 0
            total.append(kl)
    assert compare_with(stored, model, IDS).kl == pytest.approx(sum(total) / len(total), rel=1e-4)


def test_a_model_is_no_distance_from_itself():
    found = compare_with(predict(Table(0), IDS, 8), Table(0), IDS)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.nll_change == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1


@pytest.mark.parametrize("sequences", [IDS[:1], [*IDS, IDS[0]], []])
def test_other_sequences_are_refused(sequences):
    stored = predict(Table(0), IDS, 4)
    with pytest.raises(ValueError, match="6 sequences were stored"):
        compare_with(stored, Table(1), sequences)
