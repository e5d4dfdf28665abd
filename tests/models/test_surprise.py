import pytest
import torch

from moeq_plugin.core.sampling import draw
from moeq_plugin.models import surprise as module
from moeq_plugin.models.surprise import surprise

TOKENS, CLASSES = 11, 37


def problem(dtype):
    rng = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(TOKENS, CLASSES, generator=rng)).to(dtype).requires_grad_()
    return logits, torch.rand(TOKENS, generator=rng)


def by_autograd(logits, chance):
    log_probs = logits.float().log_softmax(-1)
    return -log_probs.gather(1, draw(log_probs.detach().exp(), chance)).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 3 * CLASSES, 2**24])
def test_value_and_gradient_are_those_of_autograd(at_once, dtype, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    logits, chance = problem(dtype)
    (expected,) = torch.autograd.grad(2.5 * by_autograd(logits, chance), logits)

    loss = surprise(logits, chance)
    (found,) = torch.autograd.grad(2.5 * loss, logits)

    torch.testing.assert_close(loss, by_autograd(logits, chance))
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected)


def test_nothing_of_the_size_of_the_logits_is_kept_but_they():
    logits, chance = problem(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        surprise(logits, chance).backward()

    large = [tensor for tensor in kept if tensor.numel() >= logits.numel()]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]


def test_no_token_costs_nothing():
    logits = torch.zeros(0, CLASSES, requires_grad=True)
    loss = surprise(logits, torch.zeros(0))
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == (0, CLASSES)
