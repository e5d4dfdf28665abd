"""The tensors of the GPTQ checkpoint format: ``qweight``, ``qzeros``, ``scales``, ``g_idx``.

A weight ``[out, in]`` is stored transposed. Its codes are unsigned, ``0`` to ``2^bits - 1``, and
form a little-endian stream of bits along the input columns, cut into int32 words; 3-bit codes
therefore cross words, and 32 of them fill three. Zero points are packed alike along the outputs.
``g_idx`` names the group of each input column: groups that are not runs of columns ("act order")
are what only this format of the two can say.

Two conventions for zero points are in use. Version 1, of AutoGPTQ, stores ``zero - 1``, so that a
zero point of 0 wraps to ``2^bits - 1``; version 2, of GPTQModel, stores what is meant.

Our own codes are signed (:mod:`moeq_plugin.core.grid`): both codes and zero points differ from
the stored ones by ``2^(bits - 1)``, and ``scale * (code - zero)`` does not change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch

from moeq_plugin.core.grid import Grid, point_of_code

WIDTHS = (2, 3, 4, 8)  # bits that readers of the format know
_WORD = 32  # bits


class ZeroPoints(StrEnum):
    """How zero points are stored; the values are what ``checkpoint_format`` calls them."""

    V1 = "gptq"
    V2 = "gptq_v2"


@dataclass(frozen=True)
class GPTQTensors:
    """One linear's weight as the format stores it.

    Attributes:
        qweight: ``[in * bits / 32, out]`` int32.
        qzeros: ``[groups, out * bits / 32]`` int32.
        scales: ``[groups, out]``.
        g_idx: ``[in]`` int32, the group of each input column.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor


@dataclass(frozen=True)
class Codes:
    """One linear's weight on its grid, in our own terms.

    Attributes:
        codes: ``[out, in]`` int8, signed.
        scale: ``[out, groups]``.
        zero_point: ``[out, groups]`` int8, signed.
        group: ``[in]`` int64, the group of each input column.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    group: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """Return ``[out, in]`` weights in the scale's dtype."""
        return point_of_code(self.codes, self.scale[:, self.group], self.zero_point[:, self.group])


def encode(weight: Codes, num_bits: int, zeros: ZeroPoints) -> GPTQTensors:
    """Return the tensors that the format stores for a weight.

    Args:
        weight: codes with their grid.
        num_bits: 2, 3, 4 or 8.
        zeros: how to store zero points.

    Raises:
        ValueError: if the format has no such width, or a dimension does not fill whole words.
    """
    offset = 1 << (num_bits - 1)
    stored = weight.zero_point.T.to(torch.int32) + offset
    if zeros is ZeroPoints.V1:
        stored = (stored - 1) % (1 << num_bits)
    return GPTQTensors(
        qweight=pack(weight.codes.T.to(torch.int32) + offset, num_bits),
        qzeros=pack(stored.T, num_bits).T.contiguous(),
        scales=weight.scale.T.contiguous(),
        g_idx=weight.group.to(torch.int32),
    )


def decode(tensors: GPTQTensors, num_bits: int, zeros: ZeroPoints) -> Codes:
    """Return the weight that stored tensors stand for; the inverse of :func:`encode`.

    Args:
        tensors: what a checkpoint holds of one linear.
        num_bits: 2, 3, 4 or 8.
        zeros: how its zero points are stored.

    Raises:
        ValueError: if the format has no such width.
    """
    codes = unpack(tensors.qweight, num_bits) - (1 << (num_bits - 1))
    return Codes(
        codes=codes.to(torch.int8).T.contiguous(),
        scale=tensors.scales.T.contiguous(),
        zero_point=decode_zero_points(tensors.qzeros, num_bits, zeros),
        group=tensors.g_idx.to(torch.int64),
    )


def decode_zero_points(qzeros: torch.Tensor, num_bits: int, zeros: ZeroPoints) -> torch.Tensor:
    """Return ``[out, groups]`` int8, the signed zero points that ``qzeros`` stands for.

    Args:
        qzeros: ``[groups, out * bits / 32]`` int32.
        num_bits: 2, 3, 4 or 8.
        zeros: how they are stored.

    Raises:
        ValueError: if the format has no such width.
    """
    stored = unpack(qzeros.T, num_bits)
    if zeros is ZeroPoints.V1:
        stored = (stored + 1) % (1 << num_bits)
    return (stored - (1 << (num_bits - 1))).to(torch.int8).contiguous()


def groups_are_runs(group: torch.Tensor, group_size: int | None) -> bool:
    """Tell whether groups are runs of ``group_size`` columns, as they are without act order.

    Args:
        group: ``[in]``, the group of each input column.
        group_size: ``None`` means one group of all columns.
    """
    return bool(torch.equal(group.long().cpu(), Grid(2, group_size).group_of_column(len(group))))


def pack(values: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Write rows of small numbers into rows of int32 words, bit after bit, lowest bit first.

    Args:
        values: ``[rows, columns]`` integers, ``0`` to ``2^num_bits - 1``.
        num_bits: 2, 3, 4 or 8.

    Returns:
        ``[rows * num_bits / 32, columns]`` int32.

    Raises:
        ValueError: if the format has no such width, or the rows do not fill whole words.

    Example:
        >>> pack(torch.tensor([[1], [2], [3], [4]]), 8)
        tensor([[67305985]], dtype=torch.int32)
    """
    per_run, words_per_run = _run(num_bits)
    if len(values) % per_run:
        raise ValueError(
            f"{len(values)} values of {num_bits} bits do not fill whole 32-bit words; the GPTQ "
            f"format needs a multiple of {per_run}. Put such modules into `ignore`."
        )
    runs = values.to(torch.int64).unflatten(0, (-1, per_run))  # [runs, values of a run, columns]
    words = runs.new_zeros(runs.shape[0], words_per_run, runs.shape[2])
    for i in range(per_run):
        word, shift = divmod(i * num_bits, _WORD)
        words[:, word] |= runs[:, i] << shift
        if shift + num_bits > _WORD:
            words[:, word + 1] |= runs[:, i] >> (_WORD - shift)
    packed: torch.Tensor = words.flatten(0, 1).to(torch.int32)  # keeps the lowest 32 bits
    return packed


def unpack(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Read rows of small numbers back; the inverse of :func:`pack`.

    Args:
        words: ``[rows * num_bits / 32, columns]`` int32.
        num_bits: 2, 3, 4 or 8.

    Returns:
        ``[rows, columns]`` int32.

    Raises:
        ValueError: if the format has no such width, or the words do not hold whole numbers.
    """
    per_run, words_per_run = _run(num_bits)
    if len(words) % words_per_run:
        raise ValueError(
            f"{len(words)} words are not a multiple of the {words_per_run} that hold "
            f"{per_run} values of {num_bits} bits"
        )
    bits = words.to(torch.int64) & 0xFFFFFFFF  # without the sign
    runs = bits.unflatten(0, (-1, words_per_run))
    values = []
    for i in range(per_run):
        word, shift = divmod(i * num_bits, _WORD)
        value = runs[:, word] >> shift
        if shift + num_bits > _WORD:
            value = value | runs[:, word + 1] << (_WORD - shift)
        values.append(value & ((1 << num_bits) - 1))
    return torch.stack(values, dim=1).flatten(0, 1).to(torch.int32)


def _run(num_bits: int) -> tuple[int, int]:
    """Return the fewest values that fill whole words, and how many words.

    Raises:
        ValueError: if the format has no such width.
    """
    if num_bits not in WIDTHS:
        raise ValueError(f"the GPTQ format has weights of 2, 3, 4 or 8 bits, got {num_bits}")
    bits = math.lcm(num_bits, _WORD)
    return bits // num_bits, bits // _WORD
