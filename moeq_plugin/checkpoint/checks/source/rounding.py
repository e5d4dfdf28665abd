"""What rounding did to a weight: sums over its groups that tell rounding from damage.

A quantizer moves each weight by a fraction of its scale. Whatever the method, what it does is
nearly orthogonal to the weight and has no preferred sign, in every row, column and group. So the
slope ``<q, w> / <w, w>`` stays near 1 and the mean of ``(q - w) / scale`` near 0, while scales,
zero points, rows and groups that are not where they belong move one of the two by much more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from moeq_plugin.checkpoint.codes import Block

_FLOAT_ERROR = 0.03  # relative, of rounding to 8-bit floats with 3 bits of mantissa
_TINY = 1e-38


@dataclass(frozen=True)
class Slices:
    """Sums over slices of a weight: its rows, its columns, its groups, or all of it.

    Attributes:
        qw: ``<q, w>``; all are tensors of the same shape, one entry for each slice.
        ww: ``<w, w>``.
        qq: ``<q, q>``.
        offset: sum of ``(q - w) / scale``.
        grid: sum of ``scale^2 / 12``, which is what rounding to nearest adds up to.
        error: ``|q - w|^2``.
        count: weights in the slice.
    """

    qw: torch.Tensor
    ww: torch.Tensor
    qq: torch.Tensor
    offset: torch.Tensor
    grid: torch.Tensor
    error: torch.Tensor
    count: torch.Tensor

    def slope(self) -> torch.Tensor:
        """Return ``<q, w> / <w, w>``, 1 where there is nothing."""
        return torch.where(self.ww > _TINY, self.qw / self.ww.clamp_min(_TINY), 1.0)

    def mean_offset(self) -> torch.Tensor:
        """Return the mean of ``(q - w) / scale``."""
        return self.offset / self.count

    def excess(self) -> torch.Tensor:
        """Return the error's size in units of what rounding to nearest would make."""
        return (self.error / self.grid.clamp_min(_TINY)).sqrt()

    def predicted(self) -> torch.Tensor:
        """Return the relative error that rounding to nearest would make."""
        return (self.grid / self.ww.clamp_min(_TINY)).sqrt()

    def cosine(self) -> torch.Tensor:
        """Return ``<q, w> / (|q| |w|)``, 0 where there is nothing."""
        return self.qw / (self.qq * self.ww).sqrt().clamp_min(_TINY)

    def summed(self, dim: int) -> Slices:
        """Return the sums over one of the dimensions."""
        return Slices(*(values.sum(dim) for values in vars(self).values()))


@dataclass(frozen=True)
class Rounding:
    """What rounding did to one weight.

    Attributes:
        groups: sums over ``[rows, groups]``.
        columns: sums over ``[in]``.
    """

    groups: Slices
    columns: Slices

    def rows(self) -> Slices:
        """Return sums over ``[rows]``."""
        return self.groups.summed(1)

    def runs(self) -> Slices:
        """Return sums over ``[groups]``, all rows of a group's columns together."""
        return self.groups.summed(0)

    def whole(self) -> Slices:
        """Return sums over the weight."""
        return self.rows().summed(0)

    def evened(self) -> Rounding:
        """Return the same with no group's grid finer than that of its row in the mean.

        A solver weighs errors by the inputs and moves those of some columns into others. It may
        leave next to nothing of a group of small weights, with a scale as small, and by that scale
        the group has moved by many steps. By the row's, which it is added up with, it has not.
        """
        groups = self.groups
        of_row = groups.grid.sum(1, keepdim=True) / groups.count.sum(1, keepdim=True)
        grid = torch.maximum(groups.grid, of_row * groups.count).clamp_min(_TINY)
        offset = groups.offset * (groups.grid / grid).sqrt()
        return replace(self, groups=replace(groups, grid=grid, offset=offset))


def measure(blocks: Iterable[Block], original: torch.Tensor) -> Rounding:
    """Return what rounding did to a weight.

    Args:
        blocks: all of its rows, in order.
        original: ``[out, in]`` float32, what it was rounded from.
    """
    groups, columns = [], []
    for block in blocks:
        rows = original[block.first : block.first + len(block.codes)]
        terms = _terms(block.weight(), rows, block.scale[:, block.group])
        groups.append([_by_group(term, block) for term in terms])
        columns.append([term.sum(0) for term in terms])
    return Rounding(
        Slices(*(torch.cat(parts) for parts in zip(*groups, strict=True))),
        Slices(*(torch.stack(parts).sum(0) for parts in zip(*columns, strict=True))),
    )


def measure_floats(quantized: torch.Tensor, original: torch.Tensor) -> Rounding:
    """Return the same for a weight in 8-bit floats, a row of which is a group.

    Args:
        quantized: ``[out, in]`` float32.
        original: likewise.
    """
    # the step of a float is in proportion to it: as wide a grid as makes the error that it has
    spread = (12**0.5 * _FLOAT_ERROR * original.square().mean(1, keepdim=True).sqrt()).clamp_min(
        _TINY
    )
    terms = _terms(quantized, original, spread.expand_as(original))
    return Rounding(
        Slices(*(term.sum(1, keepdim=True) for term in terms)),
        Slices(*(term.sum(0) for term in terms)),
    )


def _terms(q: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> list[torch.Tensor]:
    """Return what is summed, in the order of the fields of :class:`Slices`."""
    moved = q - w
    return [
        q * w, w.square(), q.square(), moved / scale, scale.square() / 12, moved.square(),
        torch.ones_like(w),
    ]  # fmt: skip


def _by_group(term: torch.Tensor, block: Block) -> torch.Tensor:
    """Return ``[rows, groups]``, the sums over the columns of each group."""
    sums = term.new_zeros(block.scale.shape)
    return sums.index_add_(1, block.group, term)
