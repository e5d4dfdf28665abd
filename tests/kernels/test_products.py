"""Products with packed weights are those with the weights that they stand for, in float64."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_products import WAYS, activations, codebook_weight, compiled_for, grid_weight

from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.core.packed_codebook import PackedFormat
from moeq_plugin.kernels import products

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

DTYPES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


@pytest.fixture(params=WAYS, autouse=True)
def way(request, monkeypatch):
    compiled_for(request.param, monkeypatch)


def assert_product(found, x, weight, tolerance, summed=None):
    """Check a product; `summed` is what is summed up in it, where that is not the weight."""
    assert found.dtype == x.dtype
    expected = x.double() @ weight.double().T
    # of the rows of the sum that is rounded, not of what is left of it
    size = x.double().abs() @ (weight if summed is None else summed).double().abs().T
    assert ((found.double() - expected).abs() <= tolerance * size + 1e-12).all()


SETTINGS = settings(derandomize=True, deadline=None, max_examples=40)


@SETTINGS
@given(
    bits=st.integers(1, 12),
    dim=st.sampled_from([1, 2, 2, 3, 4, 8]),
    group=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    shape=st.tuples(st.integers(1, 90), st.integers(1, 70)),
    count=st.sampled_from([1, 1, 2, 5, 13, 100]),
    dtype=st.sampled_from(list(DTYPES)),
    threads=st.sampled_from([1, 1, 1, 2]),
    seed=st.integers(0, 99),
)
def test_of_a_codebook_weight(bits, dim, group, shape, count, dtype, threads, seed):
    check_codebooks(bits, dim, group, shape, count, dtype, threads, seed)


@SETTINGS
@given(
    bits=st.integers(1, 8),
    dim=st.sampled_from([1, 2]),
    # tiles whose codes are looked up many at a time, and others at the edges
    group=st.tuples(st.integers(1, 20), st.sampled_from([16, 32, 64, 96, 128])),
    shape=st.tuples(st.integers(1, 60), st.sampled_from([8, 16, 32, 40, 64, 72, 128, 200, 256])),
    count=st.sampled_from([1, 1, 2, 3, 4, 5, 7, 8, 13, 100]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    threads=st.sampled_from([1, 1, 1, 2]),
    seed=st.integers(0, 99),
)
def test_of_a_codebook_weight_in_wide_tiles(bits, dim, group, shape, count, dtype, threads, seed):
    check_codebooks(bits, dim, group, shape, count, dtype, threads, seed)


def check_codebooks(bits, dim, group, shape, count, dtype, threads, seed):
    tolerance, dtype = DTYPES[dtype], getattr(torch, dtype)
    form = CodebookFormat(bits, dim, group[0], group[1] * dim)
    shape = shape[0], shape[1] * dim
    weight = codebook_weight(form, shape, dtype, seed)
    packed_form = PackedFormat.of(weight)
    packed = packed_form.pack(weight)
    product = products.codebook_product(packed, packed_form, shape, dtype)
    if product is None:  # too small to be read in whole chunks
        assert sum(packed_form.sizes(shape)[1:]) < 16
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = activations(count, shape[1], dtype, seed)
        assert_product(product(x), x, weight.decode(), tolerance)
    finally:
        torch.set_num_threads(before)


@SETTINGS
@given(
    bits=st.integers(1, 8),
    dim=st.sampled_from([1, 2, 2, 3]),
    group=st.tuples(st.integers(1, 20), st.sampled_from([7, 16, 32, 64])),
    shape=st.tuples(st.integers(1, 40), st.sampled_from([8, 16, 40, 64, 72, 128])),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 99),
)
def test_a_codebook_weight_comes_out_bit_for_bit(bits, dim, group, shape, dtype, seed):
    dtype = getattr(torch, dtype)
    form = CodebookFormat(bits, dim, group[0], group[1] * dim)
    weight = codebook_weight(form, (shape[0], shape[1] * dim), dtype, seed)
    packed_form = PackedFormat.of(weight)
    packed = packed_form.pack(weight)
    product = products.codebook_product(packed, packed_form, (shape[0], shape[1] * dim), dtype)
    if product is not None:
        assert_every_weight(product, weight.decode())


# groups that are fast, were they not followed by a few vectors more
@pytest.mark.parametrize(("group", "vectors"), [(13, 39), (16, 20), (32, 36)])
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_that_begin_within_a_byte_come_out_bit_for_bit(bits, dim, group, vectors):
    form, shape = CodebookFormat(bits, dim, 5, group * dim), (11, vectors * dim)
    weight = codebook_weight(form, shape, torch.float32, bits)
    packed_form = PackedFormat.of(weight)
    packed = packed_form.pack(weight)
    product = products.codebook_product(packed, packed_form, shape, torch.float32)
    assert_every_weight(product, weight.decode())


@pytest.mark.parametrize("size", [1.0, 1e-4], ids=["normal", "subnormal"])
@pytest.mark.parametrize("bits", [3, 6, 7])
@pytest.mark.parametrize("dim", [1, 2])
def test_half_precision_comes_out_bit_for_bit(dim, bits, size):
    """As it is rounded itself, in tiles that are fast in other precisions, and near zero."""
    form = CodebookFormat(bits, dim, 8, 32 * dim)
    weight = codebook_weight(form, (16, 64 * dim), torch.float16, bits, size)
    decoded = weight.decode()
    below_normal = (decoded.abs() < torch.finfo(torch.float16).tiny).double().mean()
    assert (below_normal > 0.5) == (size < 1)
    packed_form = PackedFormat.of(weight)
    packed = packed_form.pack(weight)
    product = products.codebook_product(packed, packed_form, (16, 64 * dim), torch.float16)
    assert_every_weight(product, decoded)


def assert_every_weight(product, weight):
    """Ask for single columns, a few at a time, and for all columns at once."""
    for dtype in {weight.dtype, torch.float32}:  # floats show what else rounding a result hides
        columns = torch.eye(weight.shape[1], dtype=dtype)
        found = torch.cat([product(few) for few in columns.split(product.few)])
        assert torch.equal(found, weight.T.to(dtype))
        many = torch.cat([columns] * (product.few // len(columns) + 1))  # more than a few
        assert torch.equal(product(many)[: len(columns)], weight.T.to(dtype))


@SETTINGS
@given(
    bits=st.integers(1, 8),
    group_size=st.sampled_from([None, 8, 16, 24, 32, 64, 128]),
    rows=st.integers(1, 50),
    groups=st.integers(1, 6),
    symmetric=st.booleans(),
    count=st.sampled_from([1, 1, 2, 3, 4, 5, 7, 8, 100]),
    dtype=st.sampled_from(list(DTYPES)),
    threads=st.sampled_from([1, 1, 1, 2]),
    seed=st.integers(0, 99),
)
def test_of_a_weight_on_a_grid(
    bits, group_size, rows, groups, symmetric, count, dtype, threads, seed
):
    tolerance, dtype = DTYPES[dtype], getattr(torch, dtype)
    columns = groups * group_size if group_size else 7 * groups + seed % 40
    groups = groups if group_size else 1
    packed, scales, zeros, (codes, zero) = grid_weight(
        bits, rows, columns, groups, dtype, asymmetric=not symmetric, seed=seed
    )
    product = products.grid_product(packed, scales, zeros, (rows, columns), bits)
    weight = ((codes - zero) * scales.double()[..., None]).flatten(1)
    # zero points are taken off when codes have been summed up
    summed = ((codes + zero) * scales.double()[..., None]).flatten(1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = activations(count, columns, dtype, seed)
        assert_product(product(x), x, weight, tolerance, summed)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 256])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_weight_on_a_grid_is_decoded_bit_for_bit(bits, group_size, dtype):
    """With a table of what codes stand for and without, whatever takes less time."""
    columns = 2 * group_size
    packed, scales, zeros, (codes, zero) = grid_weight(bits, 7, columns, 2, dtype, asymmetric=True)
    product = products.grid_product(packed, scales, zeros, (7, columns), bits)
    many = torch.eye(columns, dtype=dtype).repeat(product.few // columns + 1, 1)
    assert len(many) > product.few

    weight = ((codes - zero) * scales[..., None].float()).flatten(1).to(dtype)
    assert torch.equal(product(many)[:columns], weight.T)


def test_groups_that_begin_within_a_byte_have_no_product():
    packed = torch.zeros(2, 1, dtype=torch.int32)
    assert products.grid_product(packed, torch.ones(2, 2), None, (2, 10), 3) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_and_nans_of_activations_stay(dtype):
    form = CodebookFormat(6, 2, group_rows=8, group_columns=32)
    weight = codebook_weight(form, (8, 32), dtype, 0)
    packed_form = PackedFormat.of(weight)
    product = products.codebook_product(packed_form.pack(weight), packed_form, (8, 32), dtype)
    # NaNs whose lower half, which bfloats lack, is all that tells them from infinity, or overflows
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for value in [torch.inf, torch.nan, 1e30, *nans]:
        x = torch.zeros(1, 32, dtype=dtype)
        x[0, 3] = value
        found, expected = product(x).double(), x.double() @ weight.decode().double().T
        assert torch.allclose(found, expected, rtol=1e-2, equal_nan=True)


def test_any_leading_shape_is_kept():
    form = CodebookFormat(4, 2, group_rows=8, group_columns=16)
    weight = codebook_weight(form, (24, 32), torch.float32, 0)
    packed_form = PackedFormat.of(weight)
    product = products.codebook_product(
        packed_form.pack(weight), packed_form, (24, 32), torch.float32
    )
    for shape in [(32,), (1, 32), (2, 3, 32), (5, 7, 32), (0, 32)]:
        assert product(torch.ones(shape)).shape == (*shape[:-1], 24)
