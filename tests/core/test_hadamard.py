"""Rotations: orthogonal, spreading outliers, and consistent between readers and writers."""

import math

import pytest
import torch

from moeq_plugin.core.hadamard import random_rotation


def known(*orders):
    """Return a source of stand-ins for Hadamard matrices, orthogonal all the same."""

    def hadamard_of(order):
        if order not in orders:
            return None
        gaussian = torch.randn(order, order, dtype=torch.float64)
        return torch.linalg.qr(gaussian).Q * math.sqrt(order)

    return hadamard_of


@pytest.mark.parametrize("size", [1, 2, 7, 12, 64, 96])
@pytest.mark.parametrize("orders", [(), (12, 8), (1, 2, 4, 8, 16)])
def test_it_is_orthogonal_for_every_size(size, orders):
    rotation = random_rotation(size, seed=0, hadamard_of=known(*orders))

    matrix = rotation.apply(torch.eye(size))

    assert rotation.size == size
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))


def test_a_power_of_two_needs_no_library_and_spreads_an_outlier_evenly():
    rotation = random_rotation(64, seed=0, hadamard_of=lambda order: None)

    rotated = rotation.apply(100 * torch.eye(64)[:3])

    torch.testing.assert_close(rotated.abs(), torch.full_like(rotated, 100 / 8))


def test_the_seed_decides():
    first, same, other = (
        random_rotation(16, seed=seed, hadamard_of=known()).apply(torch.eye(16))
        for seed in (0, 0, 1)
    )

    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("rows", [0, 1, 5000], ids=lambda n: f"{n}-rows")
def test_what_is_written_is_read_back(rows):
    """``reader(writer(x))`` through the rotated stream is what it was without."""
    generator = torch.Generator().manual_seed(0)
    writer, bias = torch.randn(24, 10, generator=generator), torch.randn(24, generator=generator)
    reader, scale = torch.randn(rows, 24, generator=generator), torch.rand(24, generator=generator)
    inputs = torch.randn(3, 10, generator=generator)
    rotation = random_rotation(24, seed=0, hadamard_of=known(12))

    stream = inputs @ rotation.of_writer(writer).T + rotation.of_bias(bias)
    read = stream @ rotation.of_reader(reader, scale).T

    torch.testing.assert_close(read, ((inputs @ writer.T + bias) * scale) @ reader.T)


def test_dtype_stays():
    rotation = random_rotation(8, seed=0, hadamard_of=known())
    weight = torch.ones(2, 8, dtype=torch.bfloat16)

    assert rotation.of_reader(weight).dtype == rotation.of_writer(weight.T).dtype == torch.bfloat16
