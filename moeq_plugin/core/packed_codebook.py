"""A weight in codebook format as one tensor of 32-bit words, in the order that products read it.

First the indices, codebook after codebook, those of one codebook row by row; they are packed
without a gap, 32 of them in ``index_bits`` words. Then the scales. Then the codebooks, each with
all first coordinates of its centroids before all second ones. Then zeros up to a whole word. One
tensor, because each takes 100 bytes of a safetensors file's index.

Version 2 had the same parts and sizes, but indices row by row of the whole weight and centroids one
after the other: a product had to fetch the indices of a codebook from far apart.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import prod

import torch
from torch.nn.functional import pad

from moeq_plugin.core.bit_packing import pack_codes, unpack_codes
from moeq_plugin.core.codebook import CodebookFormat, CodebookWeight

FORMAT_VERSION = 3  # of what PackedFormat packs, and of the configuration that lists the formats
READABLE_VERSIONS = (2, FORMAT_VERSION)


@dataclass(frozen=True)
class PackedParts:
    """Views into a packed tensor.

    Attributes:
        indices: int32 words.
        scales: ``[row groups, column groups]``.
        codebooks: ``[row groups, column groups, vector_dim, centroids]`` int8.
    """

    indices: torch.Tensor
    scales: torch.Tensor
    codebooks: torch.Tensor


@dataclass(frozen=True)
class PackedFormat(CodebookFormat):
    """A codebook format, and how a weight in it becomes one int32 tensor.

    Attributes:
        scale_dtype: name of the dtype that scales are stored in.
    """

    scale_dtype: str = field(kw_only=True)

    @classmethod
    def of(cls, weight: CodebookWeight) -> PackedFormat:
        """Return the format that stores a weight exactly."""
        return cls.to_store(weight.form, weight.scale.dtype)

    @classmethod
    def to_store(cls, form: CodebookFormat, dtype: torch.dtype) -> PackedFormat:
        """Return the format that stores weights of a dtype in a codebook format."""
        scale_dtype = str(dtype).removeprefix("torch.")
        return cls(**asdict(form) | {"scale_dtype": scale_dtype})

    def sizes(self, shape: tuple[int, int]) -> list[int]:
        """Return the bytes of indices, scales, codebooks and padding of a matrix of ``shape``."""
        scale_dtype: torch.dtype = getattr(torch, self.scale_dtype)
        words = -(-prod(shape) // (32 * self.vector_dim)) * self.index_bits
        codebooks = prod(self.grid(shape))
        scales = codebooks * scale_dtype.itemsize
        entries = codebooks * self.num_centroids * self.vector_dim
        return [4 * words, scales, entries, -(scales + entries) % 4]

    def num_words(self, shape: tuple[int, int]) -> int:
        """Return the length of the tensor that stands for a matrix of ``shape``."""
        return sum(self.sizes(shape)) // 4

    def pack(self, weight: CodebookWeight) -> torch.Tensor:
        """Return the ``[words]`` int32 tensor that stands for a weight of this format."""
        codes = weight.codes
        ordered = torch.empty_like(codes).flatten()
        ordered[positions(codes.shape, self, codes.device)] = codes
        parts = pack_codes(ordered, self.index_bits), weight.scale, weight.codebook.mT.contiguous()
        stored = torch.cat([part.flatten().view(torch.uint8) for part in parts])
        return pad(stored, (0, -len(stored) % 4)).view(torch.int32)

    def parts(self, packed: torch.Tensor, shape: tuple[int, int]) -> PackedParts:
        """Return what a packed matrix of ``shape`` consists of, without a copy."""
        words, scales, codebooks, _ = packed.view(torch.uint8).split(self.sizes(shape))
        grid = self.grid(shape)
        return PackedParts(
            words.view(torch.int32),
            scales.view(getattr(torch, self.scale_dtype)).view(grid),
            codebooks.view(torch.int8).view(*grid, self.vector_dim, self.num_centroids),
        )

    def unpack(self, packed: torch.Tensor, shape: tuple[int, int]) -> CodebookWeight:
        """Return the weight of a matrix of ``shape``, the inverse of :meth:`pack`."""
        parts, vectors = self.parts(packed, shape), (shape[0], shape[1] // self.vector_dim)
        ordered = unpack_codes(parts.indices, self.index_bits, (prod(vectors),))
        codes = ordered[positions(torch.Size(vectors), self, packed.device)]
        return CodebookWeight(codes, parts.codebooks.mT.contiguous(), parts.scales, self)

    def from_version_2(self, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """Return what version 2 packed as this version packs it; a matrix of ``shape``."""
        parts, vectors = self.parts(packed, shape), (shape[0], shape[1] // self.vector_dim)
        codes = unpack_codes(parts.indices, self.index_bits, vectors)
        codebook = parts.codebooks.reshape(*self.grid(shape), self.num_centroids, self.vector_dim)
        return self.pack(CodebookWeight(codes, codebook, parts.scales, self))


def positions(shape: torch.Size, form: CodebookFormat, device: torch.device) -> torch.Tensor:
    """Return ``[out, vectors]`` int64, where each index lies among all indices of a weight.

    Args:
        shape: ``(out, vectors)``, that of the codes.
        form: the format.
        device: where to.
    """
    rows, vectors = shape
    row, vector = torch.arange(rows, device=device)[:, None], torch.arange(vectors, device=device)
    group_vectors = form.group_columns // form.vector_dim
    first_row = row // form.group_rows * form.group_rows
    first_vector = vector // group_vectors * group_vectors
    # the last groups may have fewer rows or vectors
    num_rows = (rows - first_row).clamp(max=form.group_rows)
    num_vectors = (vectors - first_vector).clamp(max=group_vectors)
    before = first_row * vectors + num_rows * first_vector
    return before + (row - first_row) * num_vectors + (vector - first_vector)
