"""Random packed weights, and products compiled for each set of instructions that there is."""

import ctypes
import pathlib

import pytest
import torch

from moeq_plugin.core.bit_packing import pack_codes
from moeq_plugin.core.codebook import CodebookWeight
from moeq_plugin.kernels import build, products

# what the processor can do decides which way is compiled; the plainest runs everywhere
WAYS = {"native": "-march=native", "avx2": "-mavx2 -mfma", "plain": "-mno-avx"}


def processor_has_avx2():
    with pathlib.Path("/proc/cpuinfo").open() as info:
        return " avx2 " in info.read()


def compiled_for(way, monkeypatch):
    """Compile for one way, and let products use it."""
    if way == "avx2" and not processor_has_avx2():
        pytest.skip("the processor has no AVX2")
    others = [option for option in build._OPTIONS if option != "-march=native"]
    monkeypatch.setattr(build, "_OPTIONS", (*others, *WAYS[way].split()))
    compiled = build._declared(ctypes.CDLL(str(build._compiled("c++"))))
    monkeypatch.setattr(products, "library", lambda: compiled)


def codebook_weight(form, shape, dtype, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    grid = form.grid(shape)
    return CodebookWeight(
        torch.randint(
            form.num_centroids, (shape[0], shape[1] // form.vector_dim), generator=generator
        ).short(),
        torch.randint(
            -127, 128, (*grid, form.num_centroids, form.vector_dim), generator=generator
        ).to(torch.int8),
        (size * (torch.rand(grid, generator=generator) * 0.01 + 1e-5)).to(dtype),
        form,
    )


def activations(count, columns, dtype, seed):
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(count, columns, generator=generator).to(dtype)


def grid_weight(bits, rows, columns, groups, dtype, *, asymmetric, seed=0):
    """Return packed codes, scales and zero points; and codes and zero points by group."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << bits, (rows, columns), generator=generator)
    scales = (torch.randn(rows, groups, generator=generator) * 0.01).to(dtype)  # also negative
    zeros = torch.randint(1 << bits, (rows, groups), generator=generator).to(torch.uint8)
    zero = zeros.long() if asymmetric else torch.full((rows, groups), 1 << (bits - 1))
    # every row begins with a word of its own
    packed = torch.stack([pack_codes(row, bits)[: -(-columns * bits // 32)] for row in codes])
    known = codes.view(rows, groups, -1), zero[..., None]
    return packed, scales, zeros if asymmetric else None, known
