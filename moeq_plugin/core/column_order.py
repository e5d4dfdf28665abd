"""Columns of a stack of weights one behind the other, in the order in which they are taken."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def in_turn(columns: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return ``[experts, out, columns]`` as ``[experts, n, out]``, those of ``[experts, n]``."""
    return torch.stack([part.index_select(1, o).T for part, o in by_expert(columns, order)])


def in_place(turns: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return ``[experts, n, out]`` as ``[experts, out, n]``, the inverse of :func:`in_turn`."""
    places = order.argsort(dim=1)
    return torch.stack([part.index_select(0, p).T for part, p in by_expert(turns, places)])


def by_expert(
    stack: torch.Tensor, index: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield experts one by one: selecting whole columns is faster than gathering elements."""
    return zip(stack, index, strict=True)
