"""Second moments give the loss of all tokens with their weights."""

import pytest
import torch

from moeq_plugin.core.awq import mean_output_loss


@pytest.mark.parametrize("tokens", [3, 50], ids=["fewer-than-features", "more-than-features"])
def test_it_is_the_mean_over_weighted_tokens(tokens):
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, 8, generator=rng)
    weights = torch.rand(tokens, generator=rng)
    change = torch.randn(5, 8, generator=rng)

    ours = mean_output_loss(change, 2 * (inputs.T * weights) @ inputs, weights.sum().item())

    expected = 0.0
    for x, a in zip(inputs.double(), weights.double(), strict=True):
        expected += a * (change.double() @ x).square().mean()
    expected /= weights.double().sum()
    assert ours == pytest.approx(expected.item(), rel=1e-5)


def test_refuses_no_tokens():
    with pytest.raises(ValueError, match=r"must be positive, got 0"):
        mean_output_loss(torch.zeros(2, 2), torch.zeros(2, 2), 0)
