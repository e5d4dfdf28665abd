"""Products read and write nothing behind their tensors: what lies there ends the process here."""

import ctypes
import faulthandler
import mmap
import os
import shutil
import signal
import sys

import pytest
import torch
from packed_products import WAYS, activations, codebook_weight, compiled_for, grid_weight

from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.core.packed_codebook import PackedFormat
from moeq_plugin.kernels import products

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel to guard a page"),
]
ROWS = 13  # the last row of a batch of four is alone


def guarded(tensor):
    """Return a copy that ends with a page; nobody may touch the next one."""
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
    count, offset = tensor.numel(), size - tensor.nbytes
    copy = torch.frombuffer(pages, dtype=tensor.dtype, count=count, offset=offset)
    return copy.copy_(tensor.flatten()).view(tensor.shape)


def ends_well(run):
    """Tell whether a child process comes to the end of a function, and not to a fault."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            run()
            os._exit(0)
        finally:  # an error is no fault, but nothing of pytest may go on twice
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGSEGV, -signal.SIGBUS)
    return code == 0


def multiply(product, columns, dtype):
    """Multiply a few rows, which are looked up, and many, for which a weight is decoded."""
    for count in (1, product.few, product.few + 1):
        x = guarded(activations(count, columns, dtype, 0))
        result = guarded(torch.zeros(count, ROWS, dtype=dtype))
        is_bfloat = dtype == torch.bfloat16
        product.times(product._at, x.data_ptr(), count, result.data_ptr(), is_bfloat, 1)
        units = -(-ROWS // product.unit)
        out = guarded(torch.zeros(ROWS, columns, dtype=dtype))
        product.decode(product._at, 0, units, out.data_ptr(), is_bfloat, 1)


@pytest.fixture(params=WAYS, autouse=True)
def way(request, monkeypatch):
    compiled_for(request.param, monkeypatch)


def test_what_is_guarded_is_not_read():
    tensor = guarded(torch.zeros(5, dtype=torch.int32))
    read = ctypes.c_int32.from_address
    assert ends_well(lambda: read(tensor.data_ptr() + 16).value)
    assert not ends_well(lambda: read(tensor.data_ptr() + 17).value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [32, 72, 192])
@pytest.mark.parametrize("bits", range(1, 9))
def test_of_a_weight_on_a_grid(bits, columns, dtype):
    packed, scales, zeros, _ = grid_weight(bits, ROWS, columns, 1, torch.float32, asymmetric=True)
    tensors = (guarded(packed), guarded(scales), guarded(zeros))
    product = products.grid_product(*tensors, (ROWS, columns), bits)
    assert product.tensors[1].data_ptr() == tensors[1].data_ptr()

    assert ends_well(lambda: multiply(product, columns, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("bits", [1, 3, 4, 6, 7, 8, 12])
def test_of_a_codebook_weight(bits, dim, dtype):
    for group in ((4, 32), (ROWS, 64), (5, 24)):
        form = CodebookFormat(bits, dim, group[0], group[1] * dim)
        weight = codebook_weight(form, (ROWS, 64 * dim), dtype, 0)
        packed_form = PackedFormat.of(weight)
        packed = guarded(packed_form.pack(weight))
        product = products.codebook_product(packed, packed_form, (ROWS, 64 * dim), dtype)

        if product is not None:  # None: too little lies behind the codes
            assert ends_well(lambda product=product: multiply(product, 64 * dim, dtype))
