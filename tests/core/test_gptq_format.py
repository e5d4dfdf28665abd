import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeq_plugin.core.gptq_format import (
    WIDTHS,
    Codes,
    GPTQTensors,
    ZeroPoints,
    decode,
    encode,
    groups_are_runs,
    pack,
    unpack,
)
from moeq_plugin.core.grid import Grid, choose_grid, dequantize, quantize

BOTH = list(ZeroPoints)


def random_codes(num_bits, rows, columns, groups, seed, *, act_order=False):
    rng = torch.Generator().manual_seed(seed)
    low, high = -(1 << (num_bits - 1)), 1 << (num_bits - 1)
    group = torch.arange(columns) // (columns // groups)
    if act_order:
        group = group[torch.randperm(columns, generator=rng)]
    return Codes(
        codes=torch.randint(low, high, (rows, columns), generator=rng).to(torch.int8),
        scale=torch.rand(rows, groups, generator=rng) + 0.1,
        zero_point=torch.randint(low, high, (rows, groups), generator=rng).to(torch.int8),
        group=group,
    )


def bit(words, column, position):
    """Return one bit of a column's stream, counted from the lowest bit of the first word."""
    return (int(words[position // 32, column]) % 2**32) >> (position % 32) & 1


@pytest.mark.parametrize(
    ("num_bits", "values", "words"),
    [
        (2, [3, 0, 1] + [0] * 13, [0b01_00_11]),
        (4, [1, 2, 3, 4, 5, 6, 7, 8], [0x87654321 - 2**32]),
        (8, [1, 2, 3, 255], [0xFF030201 - 2**32]),
        # value 10 lies on bits 30 to 32: its upper bit opens the second word
        (3, [0] * 10 + [0b101] + [0] * 21, [0b01 << 30, 0b1, 0]),
        # value 21 lies on bits 63 to 65: its upper two bits open the third word
        (3, [0] * 21 + [0b110] + [0] * 10, [0, 0, 0b11]),
        (3, [0] * 21 + [0b001] + [0] * 10, [0, -(2**31), 0]),
        (3, [0] * 31 + [0b100], [0, 0, -(2**31)]),
    ],
)
def test_known_words(num_bits, values, words):
    column = torch.tensor(values)[:, None]
    packed = pack(column, num_bits)
    assert packed.dtype == torch.int32
    assert packed[:, 0].tolist() == words
    assert unpack(packed, num_bits)[:, 0].tolist() == values


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_every_bit_is_where_a_loop_over_bits_finds_it(num_bits):
    rng = torch.Generator().manual_seed(num_bits)
    values = torch.randint(0, 2**num_bits, (64, 3), generator=rng)
    packed = pack(values, num_bits)
    for row in range(64):
        for column in range(3):
            bits = [bit(packed, column, row * num_bits + i) for i in range(num_bits)]
            assert sum(b << i for i, b in enumerate(bits)) == values[row, column]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    num_bits=st.sampled_from(WIDTHS),
    rows=st.integers(1, 3),
    groups=st.integers(1, 4),
    zeros=st.sampled_from(BOTH),
    act_order=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_decoding_is_the_inverse_of_encoding(num_bits, rows, groups, zeros, act_order, seed):
    weight = random_codes(num_bits, 32 * rows, 32 * groups, groups, seed, act_order=act_order)
    tensors = encode(weight, num_bits, zeros)
    again = decode(tensors, num_bits, zeros)
    for name in ("codes", "scale", "zero_point", "group"):
        assert torch.equal(getattr(again, name), getattr(weight, name)), name
    assert again.codes.dtype == torch.int8
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        twice = encode(again, num_bits, zeros)
        assert torch.equal(getattr(twice, name), getattr(tensors, name)), name


@pytest.mark.parametrize("zeros", BOTH)
@pytest.mark.parametrize("num_bits", WIDTHS)
def test_the_value_of_a_weight_follows_from_its_bits(num_bits, zeros):
    """``scales[g] * (code - zero)`` with everything read bit by bit, in float64."""
    weight = random_codes(num_bits, 32, 64, 2, seed=7, act_order=True)
    stored = encode(weight, num_bits, zeros)
    qzeros = stored.qzeros.T  # now packed along rows, as qweight is

    def number(words, column, index):
        return sum(bit(words, column, index * num_bits + i) << i for i in range(num_bits))

    expected = torch.empty(32, 64, dtype=torch.float64)
    for out in range(32):
        for column in range(64):
            g = int(stored.g_idx[column])
            zero = number(qzeros, g, out)
            if zeros is ZeroPoints.V1:
                zero = (zero + 1) % 2**num_bits
            code = number(stored.qweight, out, column)
            expected[out, column] = float(stored.scales[g, out]) * (code - zero)
    torch.testing.assert_close(weight.dequantize().double(), expected)


@pytest.mark.parametrize(
    ("num_bits", "v1", "v2"),
    # of eight symmetric outputs: the middle of the unsigned range, and one below
    [(4, 0x77777777, 0x88888888 - 2**32), (8, 0x7F7F7F7F, 0x80808080 - 2**32)],
)
def test_the_two_conventions_store_a_symmetric_zero_point_as_known(num_bits, v1, v2):
    outputs = 32 // num_bits
    weight = random_codes(num_bits, outputs, 32, 1, seed=0)
    weight = Codes(weight.codes, weight.scale, torch.zeros_like(weight.zero_point), weight.group)
    assert encode(weight, num_bits, ZeroPoints.V1).qzeros.tolist() == [[v1]]
    assert encode(weight, num_bits, ZeroPoints.V2).qzeros.tolist() == [[v2]]


@pytest.mark.parametrize("num_bits", WIDTHS)
def test_the_lowest_zero_point_wraps_to_all_ones_in_version_1(num_bits):
    weight = random_codes(num_bits, 32, 32, 1, seed=0)
    lowest = torch.full_like(weight.zero_point, -(1 << (num_bits - 1)))
    weight = Codes(weight.codes, weight.scale, lowest, weight.group)
    stored = encode(weight, num_bits, ZeroPoints.V1)
    assert (stored.qzeros == -1).all()
    assert torch.equal(decode(stored, num_bits, ZeroPoints.V1).zero_point, lowest)
    assert (encode(weight, num_bits, ZeroPoints.V2).qzeros == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", WIDTHS)
def test_a_weight_on_our_grid_keeps_its_values(num_bits, symmetric):
    grid = Grid(num_bits, 16, symmetric)
    dense = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    scale, zero_point = choose_grid(dense, grid)
    codes = quantize(dense, scale, zero_point, grid)
    weight = Codes(codes, scale, zero_point, grid.group_of_column(64))
    again = decode(encode(weight, num_bits, ZeroPoints.V1), num_bits, ZeroPoints.V1)
    assert torch.equal(again.dequantize(), dequantize(codes, scale, zero_point, grid))


def test_runs_of_columns_are_told_from_act_order():
    plain = torch.arange(64, dtype=torch.int32) // 32
    assert groups_are_runs(plain, 32)
    assert not groups_are_runs(plain, 16)
    assert not groups_are_runs(plain.flip(0), 32)
    assert groups_are_runs(torch.zeros(64), None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack(torch.zeros(32, 1), 5), "2, 3, 4 or 8 bits, got 5"),
        (lambda: pack(torch.zeros(30, 1), 4), "30 values of 4 bits .* multiple of 8"),
        (lambda: pack(torch.zeros(16, 1), 3), "16 values of 3 bits .* multiple of 32"),
        (
            lambda: unpack(torch.zeros(4, 1, dtype=torch.int32), 3),
            "4 words are not a multiple of the 3",
        ),
    ],
    ids=["width", "words", "three-bit-words", "unpack"],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_stored_tensors_have_the_shapes_that_readers_allocate():
    stored = encode(random_codes(3, 32, 64, 4, seed=0), 3, ZeroPoints.V1)
    assert isinstance(stored, GPTQTensors)
    assert [tuple(t.shape) for t in vars(stored).values()] == [(6, 32), (4, 3), (4, 32), (64,)]
    assert [t.dtype for t in vars(stored).values()] == [
        torch.int32, torch.int32, torch.float32, torch.int32,
    ]  # fmt: skip
    assert all(t.is_contiguous() for t in vars(stored).values())
