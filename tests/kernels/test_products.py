"""Products with packed weights are those with the weights that they stand for, in float64."""

import ctypes
import pathlib
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeq_plugin.core.bit_packing import pack_codes
from moeq_plugin.core.codebook import CodebookFormat, CodebookWeight
from moeq_plugin.core.packed_codebook import PackedFormat
from moeq_plugin.kernels import build, products

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

# what the processor can do decides which way is compiled; the plainest runs everywhere
WAYS = {"native": "-march=native", "avx2": "-mavx2 -mfma", "plain": "-mno-avx"}
DTYPES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


def processor_has_avx2():
    with pathlib.Path("/proc/cpuinfo").open() as info:
        return " avx2 " in info.read()


@pytest.fixture(params=WAYS, autouse=True)
def way(request, monkeypatch):
    """Compile for one way, and let products use it."""
    if request.param == "avx2" and not processor_has_avx2():
        pytest.skip("the processor has no AVX2")
    others = [option for option in build._OPTIONS if option != "-march=native"]
    monkeypatch.setattr(build, "_OPTIONS", (*others, *WAYS[request.param].split()))
    compiled = build._declared(ctypes.CDLL(str(build._compiled("c++"))))
    monkeypatch.setattr(products, "library", lambda: compiled)
    return request.param


def codebook_weight(form, shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    grid = form.grid(shape)
    return CodebookWeight(
        torch.randint(
            form.num_centroids, (shape[0], shape[1] // form.vector_dim), generator=generator
        ).short(),
        torch.randint(
            -127, 128, (*grid, form.num_centroids, form.vector_dim), generator=generator
        ).to(torch.int8),
        (torch.rand(grid, generator=generator) * 0.01 + 1e-5).to(dtype),
        form,
    )


def activations(count, columns, dtype, seed):
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(count, columns, generator=generator).to(dtype)


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


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_that_begin_within_a_byte_come_out_bit_for_bit(bits, dim):
    form = CodebookFormat(bits, dim, 5, 13 * dim)
    weight = codebook_weight(form, (11, 39 * dim), torch.float32, bits)
    packed_form = PackedFormat.of(weight)
    packed = packed_form.pack(weight)
    product = products.codebook_product(packed, packed_form, (11, 39 * dim), torch.float32)
    assert_every_weight(product, weight.decode())


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
    generator = torch.Generator().manual_seed(seed)
    columns = groups * group_size if group_size else 7 * groups + seed % 40
    groups = groups if group_size else 1
    codes = torch.randint(1 << bits, (rows, columns), generator=generator)
    scales = (torch.randn(rows, groups, generator=generator) * 0.01).to(dtype)  # also negative
    zeros = None
    if not symmetric:
        zeros = torch.randint(1 << bits, (rows, groups), generator=generator).to(torch.uint8)
    # every row begins with a word of its own
    packed = torch.stack([pack_codes(row, bits)[: -(-columns * bits // 32)] for row in codes])
    product = products.grid_product(packed, scales, zeros, (rows, columns), bits)
    middle = torch.full((rows, groups), 1 << (bits - 1))
    zero = (middle if zeros is None else zeros.long())[..., None]
    weight = ((codes.view(rows, groups, -1) - zero) * scales.double()[..., None]).flatten(1)
    # zero points are taken off when codes have been summed up
    summed = ((codes.view(rows, groups, -1) + zero) * scales.double()[..., None]).flatten(1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = activations(count, columns, dtype, seed)
        assert_product(product(x), x, weight, tolerance, summed)
    finally:
        torch.set_num_threads(before)


def test_groups_that_begin_within_a_byte_have_no_product():
    packed = torch.zeros(2, 1, dtype=torch.int32)
    assert products.grid_product(packed, torch.ones(2, 2), None, (2, 10), 3) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_and_nans_of_activations_stay(dtype):
    form = CodebookFormat(6, 2, group_rows=8, group_columns=32)
    weight = codebook_weight(form, (8, 32), dtype, 0)
    packed_form = PackedFormat.of(weight)
    product = products.codebook_product(packed_form.pack(weight), packed_form, (8, 32), dtype)
    for value in [torch.inf, torch.nan, 1e30]:
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
