"""Means and quantiles over tokens with standard errors over sequences.

Tokens of one sequence are not independent, so every error comes from how sequences differ.
Sequences count equally, however long they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

_ROUNDING = 1e-9


def mean_and_stderr(of_sequences: torch.Tensor) -> tuple[float, float]:
    """Return the mean of ``[sequences]`` and its standard error, NaN for a single one."""
    values = of_sequences.double()
    if len(values) < 2:
        return values.mean().item(), math.nan
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def quantile_and_stderr(of_sequences: Sequence[torch.Tensor], share: float) -> tuple[float, float]:
    """Return the smallest value that ``share`` of all tokens do not exceed, with its error.

    The error is Woodruff's (Journal of the American Statistical Association 47, 1952): that of
    the share of tokens at or below the quantile, which is a mean over sequences, carried over by
    the quantiles one error to either side.

    Args:
        of_sequences: one vector of tokens' values per sequence; any lengths but 0.
        share: between 0 and 1.

    Example:
        >>> quantile_and_stderr([torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])], 0.5)
        (2.0, 0.0)
    """
    values = torch.cat(list(of_sequences)).double()
    weights = torch.cat([x.new_full(x.shape, 1 / len(x)).double() for x in of_sequences])
    order = values.argsort()
    values, reached = values[order], weights[order].cumsum(0) / len(of_sequences)

    def at(wanted: float) -> float:
        # with slack for rounding: sums of 1/n need not reach their exact value
        index = int((reached < min(max(wanted, 0.0), 1.0) - _ROUNDING).sum())
        return values[min(index, len(values) - 1)].item()

    quantile = at(share)
    below = torch.stack([(x.double() <= quantile).double().mean() for x in of_sequences])
    _, stderr = mean_and_stderr(below)
    if math.isnan(stderr):
        return quantile, math.nan
    return quantile, (at(share + stderr) - at(share - stderr)) / 2
