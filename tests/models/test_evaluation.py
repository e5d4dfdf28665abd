import math
from types import SimpleNamespace

import pytest
import torch

from moeq_plugin.models.evaluation import evaluate


class Lookup(torch.nn.Module):
    """A language model whose logits depend on the last token alone."""

    def __init__(self, seed, vocabulary=7):
        super().__init__()
        self.logits = torch.randn(
            vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)
        )

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.logits[input_ids])


@pytest.fixture
def sequences():
    ids = torch.randint(0, 7, (5, 9), generator=torch.Generator().manual_seed(0))
    return [ids[:2], ids[2:]]


def test_equals_a_float64_loop_over_tokens(sequences):
    model, reference = Lookup(1), Lookup(2)
    nll, divergence, agreed, count = 0.0, 0.0, 0, 0
    for batch in sequences:
        for row in batch.tolist():
            for token, target in zip(row, row[1:], strict=False):
                p = reference.logits[token].double().softmax(0)
                q = model.logits[token].double().softmax(0)
                nll -= q[target].log().item()
                divergence += sum(a * (a / b).log() for a, b in zip(p, q, strict=True)).item()
                agreed += int(p.argmax() == q.argmax())
                count += 1

    result = evaluate(model, reference, sequences)

    assert result.num_tokens == count == 5 * 8
    assert result.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert result.kl == pytest.approx(divergence / count, rel=1e-5)
    assert result.top1_agreement == pytest.approx(agreed / count)


def test_a_model_is_no_distance_from_itself(sequences):
    result = evaluate(Lookup(1), Lookup(1), sequences)
    assert result.kl == pytest.approx(0, abs=1e-7)
    assert result.top1_agreement == 1
    assert result.perplexity == result.reference_perplexity


def test_the_standard_error_is_over_sequences(sequences):
    model, reference = Lookup(1), Lookup(2)
    one_by_one = [evaluate(model, reference, [row[None]]).kl for b in sequences for row in b]
    expected = torch.tensor(one_by_one).std().item() / math.sqrt(5)
    assert evaluate(model, reference, sequences).kl_stderr == pytest.approx(expected, rel=1e-4)


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="at least one sequence to evaluate on, got none"):
        evaluate(Lookup(1), Lookup(1), [])


def test_every_standard_error_is_that_of_independent_sequences(sequences):
    model, reference = Lookup(1), Lookup(2)
    singles = [evaluate(model, reference, [row[None]]) for b in sequences for row in b]

    result = evaluate(model, reference, sequences)

    assert result.num_sequences == 5
    for name in ("kl", "top1_agreement", "nll_change"):
        alone = torch.tensor([getattr(single, name) for single in singles], dtype=torch.float64)
        assert getattr(result, name) == pytest.approx(alone.mean().item(), rel=1e-6), name
        expected = alone.std().item() / math.sqrt(5)
        assert getattr(result, f"{name}_stderr") == pytest.approx(expected, rel=1e-6), name
    for name in ("perplexity", "reference_perplexity"):
        logs = torch.tensor([getattr(single, name) for single in singles]).double().log()
        expected = getattr(result, name) * logs.std().item() / math.sqrt(5)
        assert getattr(result, f"{name}_stderr") == pytest.approx(expected, rel=1e-5), name


def test_the_change_of_the_log_perplexity_is_paired(sequences):
    result = evaluate(Lookup(1), Lookup(2), sequences)
    expected = math.log(result.perplexity / result.reference_perplexity)
    assert result.nll_change == pytest.approx(expected)

    itself = evaluate(Lookup(1), Lookup(1), sequences)
    assert itself.nll_change == itself.nll_change_stderr == 0
    assert itself.perplexity_stderr > 0


def test_quantiles_and_maximum_are_those_of_the_tokens(sequences):
    model, reference = Lookup(1), Lookup(2)
    tokens = torch.cat([row[:-1] for batch in sequences for row in batch])
    p, q = (m.logits[tokens].double().log_softmax(1) for m in (reference, model))
    kl = (p.exp() * (p - q)).sum(1).sort().values

    result = evaluate(model, reference, sequences)

    assert result.kl_median == pytest.approx(kl[19].item(), rel=1e-5)  # 20 of 40
    assert result.kl_p99 == pytest.approx(kl[39].item(), rel=1e-5)
    assert result.kl_max == pytest.approx(kl[-1].item(), rel=1e-5)


def test_the_order_and_the_size_of_batches_change_nothing(sequences):
    model, reference = Lookup(1), Lookup(2)
    rows = [row[None] for batch in sequences for row in batch]

    one, other = evaluate(model, reference, sequences), evaluate(model, reference, rows[::-1])

    assert one.routing is other.routing is None
    for name, value in list(vars(one).items())[:-1]:
        assert getattr(other, name) == pytest.approx(value, rel=1e-6), name


def test_long_sequences_are_compared_piece_by_piece_without_a_seam():
    ids = torch.randint(0, 7, (2, 600), generator=torch.Generator().manual_seed(1))
    model, reference = Lookup(1), Lookup(2)
    p, q = (m.logits[ids[:, :-1]].double().log_softmax(-1) for m in (reference, model))

    result = evaluate(model, reference, [ids])

    assert result.num_tokens == 2 * 599
    assert result.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    nll = -q.gather(2, ids[:, 1:, None]).mean().item()
    assert math.log(result.perplexity) == pytest.approx(nll, rel=1e-6)


def test_a_single_sequence_has_no_error(sequences):
    result = evaluate(Lookup(1), Lookup(2), [sequences[0][:1]])
    assert math.isnan(result.kl_stderr)
    assert math.isnan(result.kl_p99_stderr)


def test_models_without_experts_have_no_routing(sequences):
    assert evaluate(Lookup(1), Lookup(2), sequences).routing is None


def test_a_sequence_of_one_token_is_refused():
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        evaluate(Lookup(1), Lookup(2), [torch.zeros(3, 1, dtype=torch.long)])


def test_it_is_public():
    import moeq_plugin

    assert moeq_plugin.evaluate is evaluate
