import pytest
import torch

from moeq_plugin.core.sensitivity import quadratic_losses, smoothed_shares


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
def test_loss_is_half_the_mean_squared_error_of_each_output(weighted):
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(3, 5, generator=generator)
    inputs = torch.randn(11, 5, generator=generator)
    weights = torch.rand(3, generator=generator) if weighted else None

    losses = quadratic_losses(difference, inputs.T @ inputs / 11, weights)

    for output in range(3):
        total = 0.0
        for x in inputs.double():
            total += float(difference[output].double() @ x) ** 2 / 11 / 2
        expected = total * (float(weights[output]) if weighted else 1.0)
        assert float(losses[output]) == pytest.approx(expected, rel=1e-5)


def test_rounding_noise_of_the_moments_gives_no_negative_loss():
    moments = torch.diag(torch.tensor([1.0, -1e-7]))
    assert quadratic_losses(torch.tensor([[0.0, 1.0]]), moments).item() == 0.0


def test_shares_keep_the_layers_total_and_reach_every_expert():
    weights = torch.tensor([5.0, 3.0, 0.0, 0.0], dtype=torch.float64)

    shares = smoothed_shares(weights, 10)

    assert shares.sum().item() == pytest.approx(weights.sum().item() / 10)
    assert (shares > 0).all()
    assert (shares[0] > shares[1]) and (shares[1] > shares[2])


def test_many_tokens_outweigh_the_prior():
    weights = torch.tensor([5e6, 3e6, 1e6, 0.0], dtype=torch.float64)
    torch.testing.assert_close(
        smoothed_shares(weights, 1e7), weights / 1e7, atol=1e-6, rtol=0
    )  # four pseudo-tokens among ten million


def test_no_tokens_have_no_shares():
    assert smoothed_shares(torch.zeros(3), 0).tolist() == [0, 0, 0]
