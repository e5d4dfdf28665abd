"""The second moments of what element-wise weights multiply."""

import pytest
import torch

from moeq_plugin.core.channel_power import ChannelPower


def sequences(count=6, tokens=30, channels=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, channels, generator=g).exp() - 1 for _ in range(count)]


def power(inputs, percentile=100.0):
    result = ChannelPower.zeros(inputs[0].shape[1])
    for sequence in inputs:
        result.add(sequence, percentile)
    return result


def test_the_weighted_loss_is_the_error_of_the_output():
    inputs = sequences()
    weight, quantized = torch.rand(5), torch.rand(5)

    loss = (power(inputs).square_sum * (weight - quantized).double() ** 2).sum()

    x = torch.cat(inputs).double()
    measured = (x * weight.double() - x * quantized.double()).square().sum()
    torch.testing.assert_close(loss, measured)


def test_a_hundred_percent_clips_nothing():
    x = torch.cat(sequences()).double()

    torch.testing.assert_close(power(sequences(), 100.0).mean(), x.square().mean(0))


def test_inputs_of_mean_zero_count():
    x = torch.tensor([[1.0, 3.0], [-1.0, -3.0]])

    assert power([x]).mean().tolist() == [1, 9]


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 100.0])
def test_neither_order_nor_split_of_the_sequences_matters(percentile):
    inputs = sequences()

    whole = power(inputs, percentile)

    first, second = power(inputs[:2], percentile), power(inputs[2:], percentile)
    torch.testing.assert_close(first.square_sum + second.square_sum, whole.square_sum)
    torch.testing.assert_close(power(inputs[::-1], percentile).square_sum, whole.square_sum)


@pytest.mark.parametrize("percentile", [10.0, 50.0, 90.0, 99.0])
def test_clipping_is_by_channel_and_sequence(percentile):
    expected = torch.zeros(5, dtype=torch.float64)
    for sequence in sequences():
        for channel in range(5):
            magnitudes = sorted(abs(x) for x in sequence[:, channel].double().tolist())
            covering = [  # the smallest value that at least this share of the tokens reaches not
                m for i, m in enumerate(magnitudes, 1) if i >= len(magnitudes) * percentile / 100
            ]
            expected[channel] += sum(min(m, covering[0]) ** 2 for m in magnitudes)

    torch.testing.assert_close(power(sequences(), percentile).square_sum, expected)


def test_clipping_removes_a_lonely_spike_and_keeps_a_loud_channel():
    x = torch.ones(200, 2)
    x[:, 1] = 50
    x[7, 0] = 1e4

    assert power([x], 99.0).mean().tolist() == [1, 2500]


def test_bfloat16_inputs_are_summed_in_float64():
    x = torch.full((100_000, 1), 0.1).bfloat16()

    torch.testing.assert_close(power([x]).mean(), x[0].double().square())


def test_without_tokens_all_channels_count_alike():
    empty = ChannelPower.zeros(3)
    empty.add(torch.zeros(0, 3), 99.0)

    assert empty.mean().tolist() == [1, 1, 1]
    assert empty.num_tokens == 0


@pytest.mark.parametrize(
    ("inputs", "percentile", "message"),
    [
        (torch.zeros(4, 2), 100.0, r"inputs must be \[tokens, 3\], got \[4, 2\]"),
        (torch.zeros(2, 4, 3), 100.0, r"got \[2, 4, 3\]"),
        (torch.zeros(4, 3), 0.0, "above 0 and at most 100, got 0.0"),
        (torch.zeros(4, 3), 101.0, "got 101.0"),
    ],
    ids=["channels", "batch", "zero", "above"],
)
def test_refuses(inputs, percentile, message):
    with pytest.raises(ValueError, match=message):
        ChannelPower.zeros(3).add(inputs, percentile)
