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
