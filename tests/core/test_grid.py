import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeq_plugin.core.grid import Grid, choose_grid, dequantize, quantize

grids = st.builds(
    Grid,
    num_bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([None, 4, 8]),
    symmetric=st.booleans(),
)


@settings(derandomize=True, max_examples=60)
@given(grids, st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_point_of_the_grid_survives_exactly(grid, seed, dtype):
    # bfloat16 rounds by up to 2^-8, which is more than half a step from 128 steps on
    assume(dtype == torch.float32 or grid.num_bits < 8 or grid.symmetric)
    rng = torch.Generator().manual_seed(seed)
    scale, zero_point = choose_grid(torch.randn(3, 16, generator=rng).to(dtype), grid)
    codes = torch.randint(grid.lowest, grid.highest + 1, (3, 16), generator=rng)

    points = dequantize(codes, scale, zero_point, grid)

    assert points.dtype == dtype
    assert torch.equal(quantize(points, scale, zero_point, grid), codes.to(torch.int8))


@settings(derandomize=True, max_examples=60)
@given(grids, st.integers(0, 2**31))
def test_every_weight_moves_by_at_most_half_a_step(grid, seed):
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
    scale, zero_point = choose_grid(weight, grid)

    rounded = dequantize(quantize(weight, scale, zero_point, grid), scale, zero_point, grid)

    step = scale.repeat_interleave(16 // scale.shape[1], dim=1)
    # a thousandth for the division in float32; the extremes are half a step outside as well: a
    # symmetric grid has no code for the positive one, an asymmetric one rounds its zero point
    assert ((rounded - weight).abs() <= 0.501 * step).all()


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [8, None], ids=["group", "channel"])
def test_agrees_with_compressed_tensors(num_bits, group_size, symmetric):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    weight[3] = weight[3].abs()
    if symmetric:  # asymmetric, their zero point of a row of zeros is the integer of a NaN
        weight[2] = 0
    grid = Grid(num_bits, group_size, symmetric)
    args = quantization.QuantizationArgs(
        num_bits=num_bits,
        symmetric=symmetric,
        strategy="group" if group_size else "channel",
        group_size=group_size,
    )
    groups = weight.unflatten(1, (-1, group_size or 16))

    scale, zero_point = choose_grid(weight, grid)
    rounded = dequantize(quantize(weight, scale, zero_point, grid), scale, zero_point, grid)

    their_scale, their_zero = utils.calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    assert torch.equal(scale, their_scale)
    assert torch.equal(zero_point, their_zero.to(torch.int8))
    theirs = quantization.fake_quantize(weight, their_scale, their_zero, args)
    assert torch.equal(rounded, theirs)


def test_zero_is_on_every_grid():
    weight = torch.tensor([[3.0, 4.0, 5.0, 6.0]])
    for symmetric in (True, False):
        grid = Grid(3, symmetric=symmetric)
        scale, zero_point = choose_grid(weight, grid)
        code = quantize(torch.zeros(1, 4), scale, zero_point, grid)
        assert dequantize(code, scale, zero_point, grid).eq(0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid(1), "num_bits must be 2 to 8, got 1"),
        (lambda: Grid(9), "num_bits must be 2 to 8, got 9"),
        (lambda: Grid(4, 0), "group_size must be positive or None, got 0"),
        (lambda: choose_grid(torch.zeros(1, 10), Grid(4, 4)), "group_size 4 must divide the 10"),
    ],
    ids=["one-bit", "nine-bits", "empty-group", "indivisible"],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
