"""The codebook format of a weight: every few columns of every few rows have their own codebook.

A row is cut into vectors of ``vector_dim`` neighbours, and each vector is replaced by the index of
one of ``2^index_bits`` centroids. ``group_rows`` rows times ``group_columns`` columns share a
codebook, which is stored as int8 with one scale. RWKVQuant (arXiv:2505.03803) has 2 rows
times 32 columns and halves its codebooks by a truncated SVD; here a codebook serves more weights
instead.

An element-wise weight, such as RWKV's token-shift vectors, is a matrix of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moeq_plugin.core.kmeans import fit_centroids, nearest


@dataclass(frozen=True)
class CodebookFormat:
    """How a weight is cut up and how large its codebooks are.

    Attributes:
        index_bits: bits per vector, 1 to 12.
        vector_dim: neighbouring columns that share an index, 1 to 8.
        group_rows: rows that share a codebook; a last group may have fewer.
        group_columns: columns that share a codebook, a multiple of ``vector_dim``; likewise.
    """

    index_bits: int = 3
    vector_dim: int = 1
    group_rows: int = 4
    group_columns: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.index_bits <= 12:
            raise ValueError(f"index_bits must be 1 to 12, got {self.index_bits}")
        if not 1 <= self.vector_dim <= 8:
            raise ValueError(f"vector_dim must be 1 to 8, got {self.vector_dim}")
        if self.group_rows < 1 or self.group_columns < 1 or self.group_columns % self.vector_dim:
            raise ValueError(
                "group_rows and group_columns must be positive and vector_dim must divide "
                f"group_columns, got {self.group_rows}, {self.group_columns}, {self.vector_dim}"
            )

    @property
    def num_centroids(self) -> int:
        """Return the centroids of one codebook."""
        return 1 << self.index_bits

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return how many codebooks there are, as ``(row groups, column groups)``.

        Raises:
            ValueError: if ``vector_dim`` does not divide the columns.
        """
        rows, columns = shape
        if columns % self.vector_dim:
            raise ValueError(f"vector_dim {self.vector_dim} must divide the {columns} columns")
        return -(-rows // self.group_rows), -(-columns // self.group_columns)

    def num_bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of a weight in 16-bit precision: indices, codebooks and scales."""
        row_groups, column_groups = self.grid(shape)
        per_codebook = 8 * self.num_centroids * self.vector_dim + 16
        indices = shape[0] * shape[1] // self.vector_dim * self.index_bits
        return indices + row_groups * column_groups * per_codebook


@dataclass(frozen=True)
class CodebookWeight:
    """A weight in codebook format.

    Attributes:
        codes: ``[out, in / vector_dim]`` int16 indices.
        codebook: ``[row groups, column groups, centroids, vector_dim]`` int8.
        scale: ``[row groups, column groups]``, what a step of the codebook is worth, in the
            weight's dtype.
        form: the format.
    """

    codes: torch.Tensor
    codebook: torch.Tensor
    scale: torch.Tensor
    form: CodebookFormat

    def decode(self) -> torch.Tensor:
        """Return the weight, ``[out, in]`` in the scale's dtype."""
        return decode(self.codes, self.codebook, self.scale, self.form)


def decode(
    codes: torch.Tensor, codebook: torch.Tensor, scale: torch.Tensor, form: CodebookFormat
) -> torch.Tensor:
    """Look every code up in its codebook; see :class:`CodebookWeight`.

    Returns:
        ``[out, in]`` in the scale's dtype.
    """
    index = codebook_of_vector(codes.shape, form, codes.device) * form.num_centroids + codes
    centroids = dequantize_codebook(codebook, scale).view(-1, form.vector_dim)
    return centroids[index].flatten(1)  # [out, vectors, dim] -> [out, in]


def encode(
    weight: torch.Tensor, form: CodebookFormat, importance: torch.Tensor | None = None
) -> CodebookWeight:
    """Fit codebooks to a weight and round every vector to the nearest centroid.

    Args:
        weight: ``[out, in]``, any float dtype.
        form: the format.
        importance: ``[in]`` second moments of the inputs, not negative: the codebooks then
            minimize the squared error of ``x * weight`` (element-wise), or of ``weight @ x`` for
            uncorrelated inputs. ``None`` means 1.

    Raises:
        ValueError: if shapes disagree or the weight is not finite.
    """
    if weight.ndim != 2 or not weight.isfinite().all():
        raise ValueError(
            f"weight must be a finite matrix, got {list(weight.shape)}"
            + ("" if weight.isfinite().all() else " with NaN or infinity")
        )
    if importance is None:
        importance = torch.ones(weight.shape[1], device=weight.device)
    if importance.shape != weight.shape[1:]:
        raise ValueError(
            f"importance must be [{weight.shape[1]}] to match the weight, "
            f"got {list(importance.shape)}"
        )
    _, column_groups = form.grid((weight.shape[0], weight.shape[1]))
    parts = []
    for group in range(column_groups):
        columns = slice(group * form.group_columns, (group + 1) * form.group_columns)
        block, of_block = weight[:, columns].float(), importance[columns].float()
        codebook, scale = fit_codebooks(block, of_block, form, weight.dtype)
        points, weights = row_group_points(block, of_block, form)
        codes = nearest(points, weights, dequantize_codebook(codebook, scale).float())
        vectors = block.shape[1] // form.vector_dim
        parts.append((codes.view(-1, vectors)[: len(weight)], codebook, scale))
    return assemble(parts, form)


def assemble(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], form: CodebookFormat
) -> CodebookWeight:
    """Join codes ``[out, vectors]``, codebooks and scales of all column groups, left to right."""
    codes, codebooks, scales = zip(*parts, strict=True)
    return CodebookWeight(
        torch.cat(codes, 1).short(), torch.stack(codebooks, 1), torch.stack(scales, 1), form
    )


def fit_codebooks(
    block: torch.Tensor, importance: torch.Tensor, form: CodebookFormat, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit one codebook per row group to a group of columns.

    Args:
        block: ``[out, columns]`` float32.
        importance: ``[columns]``, not negative.
        form: the format.
        dtype: that of the scales.

    Returns:
        What :func:`quantize_codebook` returns, for ``[row groups, centroids, vector_dim]``.
    """
    points, weights = row_group_points(block, importance, form)
    return quantize_codebook(fit_centroids(points, weights, form.num_centroids), dtype)


def row_group_points(
    block: torch.Tensor, importance: torch.Tensor, form: CodebookFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return vectors and their weights, both ``[row groups, vectors, vector_dim]``.

    Rows that the last group lacks are filled up with weight 0.
    """
    missing = -len(block) % form.group_rows
    weights = importance.expand(len(block), -1)
    points, weights = (torch.nn.functional.pad(t, (0, 0, 0, missing)) for t in (block, weights))
    shape = (len(points) // form.group_rows, -1, form.vector_dim)
    return points.reshape(shape), weights.reshape(shape)


def quantize_codebook(
    centroids: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 codebooks ``[..., centroids, dim]`` and scales ``[...]`` of ``dtype``.

    The scale is the largest magnitude over 127, and positive even if all centroids are 0.
    """
    scale = (centroids.abs().amax((-2, -1)) / 127).to(dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    steps = centroids / scale[..., None, None].to(centroids.dtype)
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def dequantize_codebook(codebook: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the centroids in the scale's dtype; the product is rounded to it once."""
    return (codebook.float() * scale[..., None, None].float()).to(scale.dtype)


def codebook_of_vector(
    shape: torch.Size, form: CodebookFormat, device: torch.device
) -> torch.Tensor:
    """Return ``[out, vectors]`` int64, which codebook each vector belongs to.

    Args:
        shape: ``(out, vectors)``, that of the codes.
        form: the format.
        device: where to.
    """
    rows, vectors = shape
    row_group = torch.arange(rows, device=device) // form.group_rows
    column_group = torch.arange(vectors, device=device) * form.vector_dim // form.group_columns
    column_groups = -(-vectors * form.vector_dim // form.group_columns)
    return row_group[:, None] * column_groups + column_group
