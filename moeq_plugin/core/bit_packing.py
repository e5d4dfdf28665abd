"""Small numbers in 32-bit words without a gap: the lowest bits first, across words."""

from __future__ import annotations

import torch


def pack_codes(codes: torch.Tensor, index_bits: int) -> torch.Tensor:
    """Pack indices into a flat int32 tensor, 32 indices in exactly ``index_bits`` words.

    Args:
        codes: indices below ``2^index_bits``, any shape; the last 32 are filled up with zeros.
        index_bits: bits of an index, at most 32.
    """
    lanes = torch.nn.functional.pad(codes.flatten().long(), (0, -codes.numel() % 32)).view(-1, 32)
    words = lanes.new_zeros(len(lanes), index_bits + 1)  # one more for a carry that is always 0
    for lane in range(32):
        word, shift = divmod(lane * index_bits, 32)
        shifted = lanes[:, lane] << shift  # int64: nothing is lost
        words[:, word] |= shifted & 0xFFFFFFFF
        words[:, word + 1] |= shifted >> 32
    words = words[:, :index_bits].flatten()
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_codes(words: torch.Tensor, index_bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return int16 indices of ``shape``, the inverse of :func:`pack_codes` up to 15 bits."""
    wide = torch.nn.functional.pad(words.view(-1, index_bits).long() & 0xFFFFFFFF, (0, 1))
    lanes = torch.empty(len(wide), 32, dtype=torch.int16, device=words.device)
    for lane in range(32):
        word, shift = divmod(lane * index_bits, 32)
        pair = wide[:, word] | (wide[:, word + 1] << 32)
        lanes[:, lane] = (pair >> shift) & ((1 << index_bits) - 1)
    return lanes.flatten()[: torch.Size(shape).numel()].view(shape)


def unpack_rows(words: torch.Tensor, num_bits: int, count: int) -> torch.Tensor:
    """Return ``[rows, count]`` int32, the unsigned codes in ``[rows, words]`` int32.

    Code ``i`` begins at bit ``i * num_bits`` of a row, lowest bits first, across words.

    Example:
        >>> unpack_rows(torch.tensor([[0b010_001_111]], dtype=torch.int32), 3, 3)
        tensor([[7, 1, 2]], dtype=torch.int32)
    """
    if num_bits in {1, 2, 4, 8, 16}:  # no code reaches into the next word
        shifts = torch.arange(0, 32, num_bits, dtype=torch.int32)
        return ((words[..., None] >> shifts) & ((1 << num_bits) - 1)).flatten(1)[:, :count]
    unsigned = words.long() & 0xFFFFFFFF
    begin = torch.arange(count) * num_bits
    word, bit = begin // 32, begin % 32
    low = unsigned[:, word] >> bit
    following = unsigned[:, (word + 1).clamp(max=words.shape[1] - 1)]
    both = torch.where(bit + num_bits > 32, low | (following << (32 - bit)), low)
    return (both & ((1 << num_bits) - 1)).int()
