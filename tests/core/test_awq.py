"""Representative inputs give the loss of all tokens with their weights."""

import pytest
import torch

from moeq_plugin.core.awq import representative_inputs


@pytest.mark.parametrize("tokens", [3, 50], ids=["fewer-than-features", "more-than-features"])
def test_the_mean_loss_is_that_of_the_weighted_tokens(tokens):
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, 8, generator=rng)
    weights = torch.rand(tokens, generator=rng)
    change = torch.randn(5, 8, generator=rng)

    rows = representative_inputs(2 * (inputs.T * weights) @ inputs, weights.sum().item())

    expected = 0.0
    for x, a in zip(inputs.double(), weights.double(), strict=True):
        expected += a * (change.double() @ x).square().sum()
    expected /= weights.double().sum()
    assert (rows @ change.T).square().sum().item() / 8 == pytest.approx(expected.item(), rel=1e-4)


def test_refuses_no_tokens():
    with pytest.raises(ValueError, match=r"must be positive, got 0"):
        representative_inputs(torch.zeros(2, 2), 0)
