"""From stored tensors back to codes and weights, a block of output rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from moeq_plugin.checkpoint.formats import num_groups
from moeq_plugin.checkpoint.headers import BITS, StoredTensor, read_bytes
from moeq_plugin.checkpoint.schemes import GPTQ_FORMS, Scheme
from moeq_plugin.core.bit_packing import unpack_rows

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16,
    "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_BLOCK_ELEMENTS = 1 << 22  # of a weight; keeps memory bounded where one tensor is large


@dataclass(frozen=True)
class Block:
    """Some output rows of a quantized weight.

    Attributes:
        codes: ``[rows, in]`` int32, without offset: 0 to ``2^bits - 1``.
        zero_point: ``[rows, groups]`` int32, in the same counting.
        scale: ``[rows, groups]`` float32.
        group: ``[in]`` int64, the group of each column.
        first: number of the first row.
    """

    codes: torch.Tensor
    zero_point: torch.Tensor
    scale: torch.Tensor
    group: torch.Tensor
    first: int

    def weight(self) -> torch.Tensor:
        """Return ``[rows, in]`` float32, what the codes stand for."""
        zero_point = self.zero_point[:, self.group]
        return (self.codes - zero_point).float() * self.scale[:, self.group]


def can_read(tensor: StoredTensor) -> bool:
    """Tell whether the tensor's numbers can be read."""
    return tensor.is_whole and tensor.dtype in _DTYPES


def read_tensor(tensor: StoredTensor) -> torch.Tensor:
    """Return a tensor of the file."""
    if not tensor.num_bytes:
        return torch.empty(tensor.shape, dtype=_DTYPES[tensor.dtype])
    flat = torch.frombuffer(read_bytes(tensor), dtype=_DTYPES[tensor.dtype])
    return flat.view(tensor.shape)


def read_rows(tensor: StoredTensor, first: int, count: int) -> torch.Tensor:
    """Return some entries of the first dimension."""
    row = tensor.num_bytes // tensor.shape[0]
    part = read_bytes(tensor, first * row, count * row)
    return torch.frombuffer(part, dtype=_DTYPES[tensor.dtype]).view(count, *tensor.shape[1:])


def pieces(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    """Yield a tensor in parts along its first dimension, each bounded in memory."""
    if len(tensor.shape) < 2 or not tensor.num_bytes:
        yield read_tensor(tensor)
        return
    elements = tensor.num_bytes * 8 // BITS[tensor.dtype] // tensor.shape[0]
    step = max(1, _BLOCK_ELEMENTS // max(1, elements))
    for first in range(0, tensor.shape[0], step):
        yield read_rows(tensor, first, min(step, tensor.shape[0] - first))


def blocks(
    found: Mapping[str, StoredTensor], scheme: Scheme, shape: tuple[int, int]
) -> Iterator[Block]:
    """Yield the codes of a weight in integers, from any of the formats that hold them.

    Args:
        found: its tensors by suffix, with the shapes that the scheme asks for.
        scheme: what it is stored in.
        shape: ``(out, in)``.
    """
    if scheme.form in GPTQ_FORMS:
        yield from _gptq_blocks(found, scheme, shape)
        return
    rows, columns = shape
    scales = read_tensor(found["weight_scale"]).float().expand(rows, num_groups(scheme, columns))
    middle = 1 << (scheme.num_bits - 1)  # codes are stored with this added, zero points too
    zeros = torch.full_like(scales, middle, dtype=torch.int32)
    is_packed = scheme.form == "pack-quantized"
    if "weight_zero_point" in found and not scheme.symmetric:
        stored = read_tensor(found["weight_zero_point"])
        zeros = (
            unpack_rows(stored.T, scheme.num_bits, rows).T if is_packed else stored.int() + middle
        )
        zeros = zeros.expand_as(scales)
    group = _groups(scheme, columns)
    step = max(1, _BLOCK_ELEMENTS // columns)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        if is_packed:
            codes = unpack_rows(
                read_rows(found["weight_packed"], first, count), scheme.num_bits, columns
            )
        else:
            codes = read_rows(found["weight"], first, count).int() + middle
        part = slice(first, first + count)
        yield Block(codes, zeros[part], scales[part], group, first)


def _gptq_blocks(
    found: Mapping[str, StoredTensor], scheme: Scheme, shape: tuple[int, int]
) -> Iterator[Block]:
    rows, columns = shape
    scales = read_tensor(found["scales"]).float().T
    offset = 1 << scheme.num_bits
    # version 1 of the format stores zero points less 1, modulo the number of codes
    less = 1 if scheme.form == "gptq" else 0
    zeros = ((unpack_rows(read_tensor(found["qzeros"]), scheme.num_bits, rows) + less) % offset).T
    if scheme.symmetric:  # readers do not look at them then
        zeros = torch.full_like(zeros, offset // 2)
    group = _groups(scheme, columns)
    if "g_idx" in found:
        group = read_tensor(found["g_idx"]).long().clamp(0, scales.shape[1] - 1)
    packed = read_tensor(found["qweight"]).T.contiguous()
    step = max(1, _BLOCK_ELEMENTS // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        codes = unpack_rows(packed[part], scheme.num_bits, columns)
        yield Block(codes, zeros[part], scales[part], group, first)


def _groups(scheme: Scheme, columns: int) -> torch.Tensor:
    group = torch.arange(columns)
    return group // scheme.group_size if scheme.group_size else group * 0
