"""Take a stack of weights in parts, so that what is computed of one stays in a cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

_OF_ACCELERATOR = 2**24  # elements: enough to keep one busy, little beside its memory


def parts(stack: torch.Tensor, in_cache: int) -> Iterator[tuple[slice, slice]]:
    """Yield experts and rows of ``[experts, out, in]``: many whole experts, or rows of one.

    Args:
        stack: whose shape and device count.
        in_cache: elements that a part has at most on a CPU, where it is more than one row.
    """
    num_experts, num_rows, num_columns = stack.shape
    at_once = _at_once(stack.device, in_cache)
    rows = min(num_rows, max(1, at_once // num_columns))
    experts = max(1, at_once // (num_rows * num_columns))
    for expert in range(0, num_experts, experts):
        for row in range(0, num_rows, rows):
            yield slice(expert, expert + experts), slice(row, row + rows)


def row_parts(stack: torch.Tensor, in_cache: int) -> Iterator[slice]:
    """Yield rows of ``[experts, out, in]``, of all experts; arguments as of :func:`parts`."""
    num_experts, num_rows, num_columns = stack.shape
    rows = max(1, _at_once(stack.device, in_cache) // (num_experts * num_columns))
    for row in range(0, num_rows, rows):
        yield slice(row, row + rows)


def _at_once(device: torch.device, in_cache: int) -> int:
    return in_cache if device.type == "cpu" else _OF_ACCELERATOR
