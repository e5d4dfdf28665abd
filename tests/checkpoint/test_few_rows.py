"""Rounding alone never looks like damage, however small a linear is; damage still does."""

import pytest
import torch

from moeq_plugin.checkpoint.checks.source.judgement import damage
from moeq_plugin.checkpoint.checks.source.rounding import measure
from moeq_plugin.checkpoint.codes import Block

GROUP = 32


def rounded(weight, num_bits):
    """Round to nearest on symmetric grids of groups, as any program would."""
    rows, columns = weight.shape
    middle = 1 << (num_bits - 1)
    group = torch.arange(columns) // GROUP
    scale = weight.view(rows, -1, GROUP).abs().amax(2) / (middle - 0.5)
    codes = (weight / scale[:, group]).round().clamp(-middle, middle - 1).int() + middle
    return Block(codes, torch.full_like(scale, middle, dtype=torch.int32), scale, group, 0)


@pytest.mark.parametrize("num_bits", [3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 64), (2, 64), (2, 1024), (4, 128), (32, 256)])
def test_rounding_is_no_damage_in_however_few_rows(shape, num_bits):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200 if shape[0] < 32 else 20):
        weight = torch.randn(shape, generator=generator)
        assert damage(measure([rounded(weight, num_bits)], weight)) is None


@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("share", [1 / 16, 1 / 4])
def test_zeroed_columns_are_found_in_many_rows(num_bits, share):
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    block = rounded(weight, num_bits)
    block.codes[:, : int(share * 256)] = 1 << (num_bits - 1)
    assert "columns are zero" in damage(measure([block], weight))


@pytest.mark.parametrize("shape", [(2, 64), (4, 128), (128, 256)])
def test_a_doubled_weight_is_found_in_however_few_rows(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    block = rounded(weight, 4)
    block.scale.mul_(1.5)
    assert damage(measure([block], weight)) is not None
