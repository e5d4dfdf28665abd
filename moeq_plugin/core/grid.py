"""The integer grid of a weight: choose scale and zero point, quantize, dequantize.

A row of ``group_size`` consecutive input columns shares one scale and one zero point; without
group size the whole row does (per channel). Codes are signed, ``[-2^(b-1), 2^(b-1) - 1]``, as
compressed-tensors stores them, and the choice below is its min-max rule, so that codes and scales
can be exchanged with it. Rounding is to nearest, ties to even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Grid:
    """What a weight may be rounded to.

    Attributes:
        num_bits: bits per code, 2 to 8.
        group_size: input columns that share a scale; ``None`` for one scale per output row.
        symmetric: zero point fixed at 0.
    """

    num_bits: int
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.num_bits <= 8:
            raise ValueError(f"num_bits must be 2 to 8, got {self.num_bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be positive or None, got {self.group_size}")

    @property
    def lowest(self) -> int:
        """Return the smallest code."""
        return -(1 << (self.num_bits - 1))

    @property
    def highest(self) -> int:
        """Return the largest code."""
        return (1 << (self.num_bits - 1)) - 1

    def group_of_column(self, num_columns: int) -> torch.Tensor:
        """Return ``[in]`` int64, the group that each input column belongs to.

        Raises:
            ValueError: if the group size does not divide the number of columns.
        """
        if self.group_size is None:
            return torch.zeros(num_columns, dtype=torch.int64)
        if num_columns % self.group_size:
            raise ValueError(
                f"group_size {self.group_size} must divide the {num_columns} input columns"
            )
        return torch.arange(num_columns) // self.group_size


def choose_grid(weight: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose scale and zero point from the extremes of each group.

    Symmetric: ``scale = 2 * max|w| / (highest - lowest)``. Asymmetric: the range is widened to
    contain 0, so that 0 is representable exactly.

    Args:
        weight: ``[..., out, in]``.
        grid: the grid's description.

    Returns:
        ``scale`` ``[..., out, groups]`` in the weight's dtype, positive even for a row of zeros,
        and ``zero_point`` of the same shape, int8.

    Example:
        >>> scale, zero_point = choose_grid(torch.tensor([[-3.0, 1.5]]), Grid(num_bits=2))
        >>> scale, zero_point
        (tensor([[2.]]), tensor([[0]], dtype=torch.int8))
    """
    groups = in_groups(weight, grid)
    return grid_of_range(groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0), grid)


def grid_of_range(
    low: torch.Tensor, high: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and zero point that just reach from ``low`` to ``high``.

    A symmetric grid reaches as far on both sides.

    Args:
        low: at most 0, any shape.
        high: at least 0, the same shape.
        grid: the grid's description.

    Returns:
        As of :func:`choose_grid`.
    """
    steps = grid.highest - grid.lowest
    scale = torch.maximum(high, -low) / (steps / 2) if grid.symmetric else (high - low) / steps
    # a row of zeros has no scale of its own: any positive one represents it exactly
    scale = torch.where(scale == 0, torch.full_like(scale, torch.finfo(scale.dtype).eps), scale)
    if grid.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int8)
    zero_point = (grid.lowest - low / scale).clamp(grid.lowest, grid.highest).round()
    return scale, zero_point.to(torch.int8)


def quantize(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Return the code of the nearest grid point, ``[..., out, in]`` int8.

    Args:
        weight: ``[..., out, in]``.
        scale: ``[..., out, groups]``, not 0; a negative one turns the grid around.
        zero_point: ``[..., out, groups]``.
        grid: the grid's description.
    """
    groups = in_groups(weight, grid)
    codes = nearest_code(groups, scale[..., None], zero_point[..., None], grid)
    return codes.to(torch.int8).flatten(-2)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Return ``(codes - zero_point) * scale``, ``[..., out, in]`` in the scale's dtype.

    The inverse of :func:`quantize` on every point of the grid.
    """
    groups = in_groups(codes, grid)
    return point_of_code(groups, scale[..., None], zero_point[..., None]).flatten(-2)


def in_groups(columns: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return ``[..., out, in]`` as ``[..., out, groups, columns of a group]``.

    Raises:
        ValueError: if the group size does not divide the number of columns.
    """
    num_groups = int(grid.group_of_column(columns.shape[-1])[-1]) + 1
    groups: torch.Tensor = columns.unflatten(-1, (num_groups, -1))
    return groups


def nearest_code(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Round, with scale and zero point that broadcast; codes come back as float32.

    In float32 because a bfloat16 quotient cannot tell 8-bit codes apart.
    """
    codes = weight.float() / scale.float() + zero_point
    return codes.round().clamp(grid.lowest, grid.highest)


def point_of_code(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    """Return the grid point of each code, in the scale's dtype, which is what a server computes."""
    return (codes.to(scale.dtype) - zero_point.to(scale.dtype)) * scale
