"""Products with packed weights on CPUs: what :file:`products.cpp` is handed and when it is used."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moeq_plugin.core.packed_codebook import PackedFormat
from moeq_plugin.kernels.build import library

_STRIP = 1 << 20  # decoded weights at a time, about what the cache of a core holds
_READ_BEHIND = 16  # bytes behind the last code that products may read
_MANTISSAS = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 8}


class _Codebooks(ctypes.Structure):
    """``Codebooks`` of products.cpp."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("vectors", ctypes.c_int64),
        ("row_groups", ctypes.c_int64),
        ("column_groups", ctypes.c_int64),
        ("group_rows", ctypes.c_int64),
        ("group_vectors", ctypes.c_int64),
        ("bits", ctypes.c_int),
        ("dim", ctypes.c_int),
        ("rounded", ctypes.c_int),
        ("codes", ctypes.c_void_p),
        ("books", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    )


class _Grid(ctypes.Structure):
    """``Grid`` of products.cpp."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("bits", ctypes.c_int),
        ("codes", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Product:
    """The product of activations with one packed weight.

    Attributes:
        shape: of the weight, ``(out, in)``.
        unit: rows that are decoded together.
        weight: what the functions are given, which holds addresses only.
        tensors: what lies at these addresses.
        few: rows of activations that are multiplied as codes are looked up; for more, decoding the
            weight pays.
        times: multiplies rows of activations.
        decode: writes units of rows.
    """

    shape: tuple[int, int]
    unit: int
    weight: ctypes.Structure
    tensors: tuple[torch.Tensor | None, ...]
    few: int
    times: Any
    decode: Any

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T`` in the dtype of ``x``, ``[..., in]`` to ``[..., out]``."""
        flat = x.reshape(-1, self.shape[1])
        result = self._by_code(flat) if len(flat) <= self.few else self._by_strip(flat)
        return result.to(x.dtype).view(*x.shape[:-1], self.shape[0])

    def _by_code(self, x: torch.Tensor) -> torch.Tensor:
        # bfloats are taken as such, other dtypes by way of float
        is_bfloat = x.dtype == torch.bfloat16
        rows = (x if is_bfloat else x.float()).contiguous()
        result = rows.new_empty(len(rows), self.shape[0])
        threads = torch.get_num_threads()
        self.times(self._at, rows.data_ptr(), len(rows), result.data_ptr(), is_bfloat, threads)
        return result

    def _by_strip(self, x: torch.Tensor) -> torch.Tensor:
        result = x.new_empty(len(x), self.shape[0])
        for first, last in self._strips():
            rows = slice(first * self.unit, min(last * self.unit, self.shape[0]))
            is_bfloat = x.dtype == torch.bfloat16
            dtype = torch.bfloat16 if is_bfloat else torch.float32
            strip = torch.empty(rows.stop - rows.start, self.shape[1], dtype=dtype)
            threads = torch.get_num_threads()
            self.decode(self._at, first, last, strip.data_ptr(), is_bfloat, threads)
            # in the dtype of the activations, as a dense layer has it
            result[:, rows] = x @ strip.to(x.dtype).T
        return result

    def _strips(self) -> Iterator[tuple[int, int]]:
        units = -(-self.shape[0] // self.unit)
        step = max(1, _STRIP * torch.get_num_threads() // (self.unit * self.shape[1]))
        yield from ((first, min(first + step, units)) for first in range(0, units, step))

    @property
    def _at(self) -> int:
        return ctypes.addressof(self.weight)


def can_multiply(x: torch.Tensor) -> bool:
    """Tell whether activations are of a kind that is compiled; gradients are torch's matter."""
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    return x.device.type == "cpu" and x.dtype in _MANTISSAS and not needs_gradient


def codebook_product(
    packed: torch.Tensor, form: PackedFormat, shape: tuple[int, int], dtype: torch.dtype
) -> Product | None:
    """Return the product with a weight in codebook format, ``None`` where there is none.

    Args:
        packed: ``[words]`` int32, on the CPU; it must not be changed or moved afterwards.
        form: its format.
        shape: of the weight.
        dtype: what centroids are rounded to, as :meth:`CodebookWeight.decode` rounds them.
    """
    compiled = library()
    if compiled is None or dtype not in _MANTISSAS or sum(form.sizes(shape)[1:]) < _READ_BEHIND:
        return None
    parts = form.parts(packed, shape)
    scales = parts.scales.to(dtype).float().contiguous()
    weight = _Codebooks(
        *shape,
        shape[1] // form.vector_dim,
        *form.grid(shape),
        form.group_rows,
        form.group_columns // form.vector_dim,
        form.index_bits,
        form.vector_dim,
        _MANTISSAS[dtype],
        parts.indices.data_ptr(),
        parts.codebooks.data_ptr(),
        scales.data_ptr(),
    )
    return _product(compiled, "codebook", shape, form.group_rows, weight, (packed, scales))


def grid_product(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    shape: tuple[int, int],
    num_bits: int,
) -> Product | None:
    """Return the product with a weight on a grid, ``None`` where there is none.

    Args:
        packed: ``[out, words]`` int32, on the CPU; it must not be changed or moved afterwards.
        scales: ``[out, groups]``.
        zeros: ``[out, groups]`` uint8, the codes that stand for 0; ``None`` for the middle one.
        shape: of the weight.
        num_bits: of a code, 1 to 8.
    """
    compiled = library()
    group_size, rest = divmod(shape[1], scales.shape[1])
    if compiled is None or rest or (scales.shape[1] > 1 and group_size % 8):
        return None
    scales = scales.float().contiguous()
    weight = _Grid(
        *shape,
        group_size,
        num_bits,
        packed.data_ptr(),
        4 * packed.shape[1],
        scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
    )
    return _product(compiled, "grid", shape, 1, weight, (packed, scales, zeros))


def _product(
    compiled: ctypes.CDLL,
    kind: str,
    shape: tuple[int, int],
    unit: int,
    weight: ctypes.Structure,
    tensors: tuple[torch.Tensor | None, ...],
) -> Product:
    """Return the product whose functions are called after a kind of weights."""
    few, times, decode = (
        getattr(compiled, f"moeq_{kind}_{name}") for name in ("few", "times", "decode")
    )
    return Product(shape, unit, weight, tensors, few(ctypes.addressof(weight)), times, decode)
