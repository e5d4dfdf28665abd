"""The codebook format: packing, looking up, counting bits, and what encoding minimizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeq_plugin.core.bit_packing import pack_codes, unpack_codes
from moeq_plugin.core.codebook import (
    CodebookFormat,
    dequantize_codebook,
    encode,
    quantize_codebook,
)

FORMS = [
    CodebookFormat(3, 1, group_rows=4, group_columns=32),
    CodebookFormat(4, 2, group_rows=5, group_columns=12),  # no divisor of the shape below
    CodebookFormat(5, 4, group_rows=100, group_columns=100),
]
SHAPE = (23, 64)


def weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(bits=st.integers(1, 12), count=st.integers(0, 100), seed=st.integers(0, 99))
def test_packing_keeps_every_index_in_its_number_of_bits(bits, count, seed):
    codes = torch.randint(0, 1 << bits, (count,), generator=torch.Generator().manual_seed(seed))

    words = pack_codes(codes, bits)

    assert words.dtype == torch.int32
    assert words.numel() == -(-count // 32) * bits
    assert torch.equal(unpack_codes(words, bits, (count,)).long(), codes)


def test_packed_bits_are_those_of_the_indices_in_order():
    codes = torch.randint(0, 8, (4, 16), generator=torch.Generator().manual_seed(0))

    words = pack_codes(codes, 3)

    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words.tolist()))
    assert stream == sum(code << (3 * i) for i, code in enumerate(codes.flatten().tolist()))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_looking_up_follows_row_and_column_groups(form):
    encoded = encode(weight(*SHAPE), form)
    decoded = encoded.decode()

    for row, column in [(0, 0), (4, 31), (5, 32), (22, 63), (13, 12), (19, 50)]:
        group = (row // form.group_rows, column // form.group_columns)
        code = encoded.codes[row, column // form.vector_dim]
        entry = encoded.codebook[group][code, column % form.vector_dim]
        assert decoded[row, column] == entry.float() * encoded.scale[group]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_bits_are_those_of_the_tensors(form):
    encoded = encode(weight(*SHAPE).bfloat16(), form)

    indices = encoded.codes.numel() * form.index_bits
    tables = encoded.codebook.numel() * 8 + encoded.scale.numel() * 16
    assert form.num_bits(SHAPE) == indices + tables


def test_the_defaults_of_the_paper_take_four_bits_without_scales():
    form = CodebookFormat(3, 1, group_rows=2, group_columns=32)

    assert form.num_bits((64, 64)) / 64**2 == 3 + (8 * 8 + 16) / 64


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_vector_takes_the_nearest_centroid(form):
    w = weight(*SHAPE)
    encoded = encode(w, form)
    best = (w - encoded.decode()).square().sum()

    for shift in range(1, form.num_centroids, 3):
        codes = (encoded.codes + shift) % form.num_centroids
        other = type(encoded)(codes, encoded.codebook, encoded.scale, form).decode()
        per_vector = [
            (w - v).square().unflatten(1, (-1, form.vector_dim)).sum(-1)
            for v in (other, encoded.decode())
        ]
        assert (per_vector[0] >= per_vector[1] - 1e-6).all()
    assert best < 0.2 * w.square().sum()


def test_importance_weights_the_error_that_is_minimized():
    w, importance = weight(1, 64), torch.logspace(-2, 2, 64)
    form = CodebookFormat(3, 1, group_rows=1, group_columns=64)

    plain, weighted = encode(w, form).decode(), encode(w, form, importance).decode()

    def cost(q):
        return ((w - q).square() * importance).sum()

    assert cost(weighted) < 0.7 * cost(plain)
    assert (w - plain).square().sum() < (w - weighted).square().sum()


@pytest.mark.parametrize("factor", [1e-7, 1e5])
def test_a_factor_on_the_importance_changes_nothing(factor):
    w, importance = weight(8, 64), weight(64, seed=1).square()

    encoded = encode(w, FORMS[0], importance)

    scaled = encode(w, FORMS[0], factor * importance)
    assert torch.equal(scaled.codes, encoded.codes)
    assert torch.equal(scaled.codebook, encoded.codebook)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("value", [0.0, -0.37, 2e-3])
def test_a_constant_is_kept_to_the_precision_of_its_dtype(form, value):
    w = torch.full(SHAPE, value)

    torch.testing.assert_close(encode(w, form).decode(), w)


def test_few_distinct_values_are_kept_to_half_a_step_of_int8():
    w = torch.tensor([-1.0, 0.25, 0.5]).repeat(8, 16)

    decoded = encode(w, FORMS[0]).decode()

    assert (decoded - w).abs().max() <= 0.5 / 127 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_result_has_the_dtype_of_the_weight(dtype):
    encoded = encode(weight(*SHAPE).to(dtype), FORMS[0])

    assert encoded.scale.dtype == encoded.decode().dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rounded_codebook_is_off_by_half_a_step(dtype):
    centroids = weight(6, 8, 2)

    codebook, scale = quantize_codebook(centroids, dtype)

    # half a step of int8, and the rounding of the product to the dtype
    bound = scale.float()[:, None, None] * 0.51 + centroids.abs() * torch.finfo(dtype).eps
    assert ((dequantize_codebook(codebook, scale).float() - centroids).abs() <= bound).all()
    assert codebook.abs().amax((1, 2)).tolist() == [127] * 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"index_bits": 0}, "index_bits must be 1 to 12, got 0"),
        ({"index_bits": 13}, "index_bits must be 1 to 12, got 13"),
        ({"vector_dim": 9}, "vector_dim must be 1 to 8, got 9"),
        ({"vector_dim": 3}, "vector_dim must divide group_columns, got 4, 32, 3"),
        ({"group_rows": 0}, "must be positive .* got 0, 32, 1"),
        ({"group_columns": 0}, "must be positive .* got 4, 0, 1"),
    ],
    ids=str,
)
def test_refuses_formats(fields, message):
    with pytest.raises(ValueError, match=message):
        CodebookFormat(**fields)


@pytest.mark.parametrize(
    ("w", "importance", "message"),
    [
        (torch.zeros(3), None, r"a finite matrix, got \[3\]$"),
        (torch.full((2, 4), torch.nan), None, r"got \[2, 4\] with NaN or infinity"),
        (torch.zeros(2, 4), torch.ones(3), r"importance must be \[4\] .* got \[3\]"),
        (torch.zeros(2, 4), -torch.ones(4), "got a minimum of -1"),
    ],
    ids=["vector", "nan", "length", "negative"],
)
def test_refuses_weights(w, importance, message):
    with pytest.raises(ValueError, match=message):
        encode(w, FORMS[0], importance)


def test_refuses_vectors_that_do_not_fit_the_columns():
    with pytest.raises(ValueError, match="vector_dim 2 must divide the 5 columns"):
        encode(weight(4, 5), FORMS[1])
