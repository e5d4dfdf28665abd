"""How evenly are the values of a weight spread? RWKVQuant's coarse-to-fine proxy.

Sort the ``N`` values of a weight and take the ``n = N - 1`` gaps ``G_i`` between neighbours. With
``u_i = G_i / mean(G)``, the gaps in units of their mean, the proxy (arXiv:2505.03803, Section 3) is

* coarse, ``P_c = mean(u ln u)``: the Kullback-Leibler divergence of the normalized gaps from equal
  ones. 0 for equally spaced values, ``ln n`` when one gap holds all of the range;
* fine, ``P_f = sum_{k=2..K} |mean((u - 1)^k)| / (k (k - 1))``: the terms of the Taylor series of
  ``P_c``, each with its absolute value, so that a few wide gaps cannot hide.

The paper writes both with ``g_i = u_i / n`` and factors ``n^k``; they cancel, so that nothing
overflows here. The series behind ``P_f`` converges only while all ``u_i <= 2``: on real weights
``P_f`` is no approximation of ``P_c`` but a detector of outliers.

Where we differ: the values depend on the number of elements and on the float format that the
weights are stored in, so by default the gaps are those between quantiles. Only the weight counts;
no data is needed. What to do with a score is :mod:`moeq_plugin.core.hybrid`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Gaps = Literal["quantile", "all", "unique"]
MAX_RUN = 1 << 22  # values that are held sorted at a time
_BINS_PER_SPLIT = 1024


@dataclass(frozen=True)
class UniformityScore:
    """How far a weight is from equally spaced values; smaller suits a scalar grid better.

    Attributes:
        p_coarse: ``P_c``, between 0 and ``ln(num_gaps)``.
        p_fine: ``P_f``, not negative.
        num_gaps: how many gaps were compared.
        degenerate: fewer than two gaps or one value only; both proxies are 0 then.
    """

    p_coarse: float
    p_fine: float
    num_gaps: int
    degenerate: bool = False


def score_uniformity(
    weight: torch.Tensor,
    gaps: Gaps = "quantile",
    *,
    bins: int = 1024,
    order: int = 4,
    max_run: int = MAX_RUN,
) -> UniformityScore:
    """Return the coarse and the fine proxy of a weight, computed in float64.

    Invariant under ``a * weight + b`` with ``a != 0``, permutation and reshaping.

    Args:
        weight: any shape, any float dtype.
        gaps: which gaps are compared. ``"all"`` is the paper's text. ``"unique"`` counts each
            distinct positive gap once, as its released code does; the published thresholds
            belong to it. ``"quantile"`` takes those between ``bins + 1`` equidistant quantiles,
            linearly interpolated, which hardly depend on size and float format.
        bins: quantile gaps; a smaller weight has as many as there are gaps.
        order: ``K``, the last moment in the fine proxy, 2 or more.
        max_run: values that are held sorted at a time, which bounds the memory.

    Raises:
        ValueError: if an option is unknown or out of range, or the weight is not finite.

    Example:
        >>> score_uniformity(torch.arange(100.0), gaps="all")
        UniformityScore(p_coarse=0.0, p_fine=0.0, num_gaps=99, degenerate=False)

    Cost: a sort. Above ``max_run`` values, one more pass over the weight per run; memory is a few
    times ``max_run`` (``"unique"``: plus the distinct gaps).
    """
    if gaps not in get_args(Gaps):
        raise ValueError(f"gaps must be one of {get_args(Gaps)}, got {gaps!r}")
    if bins < 2 or order < 2 or max_run < 2:
        raise ValueError(
            f"bins, order and max_run must be at least 2, got {bins}, {order} and {max_run}"
        )
    values = weight.detach().flatten()
    pieces = values.split(max_run)
    if not all(bool(piece.isfinite().all()) for piece in pieces):
        raise ValueError("the weight contains NaN or infinity")
    if len(values) < 3 or values.min() == values.max():
        return UniformityScore(0.0, 0.0, max(0, len(values) - 1), degenerate=True)
    runs = _sorted_runs(pieces, max_run)
    if gaps == "quantile":
        quantiles = _quantiles(runs, len(values), min(bins, len(values) - 1))
        return _score([quantiles.diff()], len(quantiles) - 1, quantiles[-1] - quantiles[0], order)
    if gaps == "unique":
        distinct = torch.empty(0, dtype=torch.float64, device=values.device)
        for run_gaps in _gaps(runs):
            distinct = torch.cat([distinct, run_gaps[run_gaps > 0]]).unique()
        return _score([distinct], len(distinct), distinct.sum(), order)
    span = values.max().double() - values.min().double()
    return _score(_gaps(runs), len(values) - 1, span, order)


def _score(
    gaps: Iterable[torch.Tensor], num_gaps: int, total: torch.Tensor, order: int
) -> UniformityScore:
    """Return the score of ``num_gaps`` gaps of sum ``total`` that come in pieces."""
    if num_gaps < 2:
        return UniformityScore(0.0, 0.0, num_gaps, degenerate=True)
    coarse = 0.0
    moments = [0.0] * (order + 1)
    for piece in gaps:
        u = piece * (num_gaps / total)
        coarse += torch.special.xlogy(u, u).sum().item()
        power = deviation = u - 1
        for k in range(2, order + 1):
            power = power * deviation
            moments[k] += power.sum().item()
    fine = sum(abs(moments[k] / num_gaps) / (k * (k - 1)) for k in range(2, order + 1))
    # rounding may leave the sum of a divergence a hair outside its bounds
    return UniformityScore(min(max(coarse / num_gaps, 0.0), math.log(num_gaps)), fine, num_gaps)


def _gaps(runs: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the gaps within and between consecutive sorted runs."""
    last: torch.Tensor | None = None
    for run in runs:
        yield (run if last is None else torch.cat([last, run])).diff()
        last = run[-1:]


def _quantiles(runs: Iterable[torch.Tensor], num_values: int, bins: int) -> torch.Tensor:
    """Return ``[bins + 1]`` quantiles at equidistant levels, linearly interpolated."""
    position = torch.arange(bins + 1, dtype=torch.float64) * (num_values - 1) / bins
    below = position.floor().long().clamp(max=num_values - 2)
    order_statistics = torch.empty(bins + 1, 2, dtype=torch.float64)
    start = 0
    for run in runs:
        for side in (0, 1):
            index = below + side - start
            here = (index >= 0) & (index < len(run))
            order_statistics[here, side] = run[index[here].to(run.device)].cpu()
        start += len(run)
    low, high = order_statistics.unbind(1)
    return low + (position - below) * (high - low)


def _sorted_runs(pieces: tuple[torch.Tensor, ...], limit: int) -> Iterator[torch.Tensor]:
    """Yield all values in ascending order as float64, at most ``limit`` in a run.

    Values are split into intervals by their distance from the smallest; an interval that still
    holds too many is split again, one that holds equal values only is already in order.
    """
    if sum(len(piece) for piece in pieces) <= limit:
        yield torch.cat(pieces).double().sort().values
        return
    low = min(piece.min().double() for piece in pieces if len(piece))
    high = max(piece.max().double() for piece in pieces if len(piece))
    if low == high:
        for piece in pieces:
            yield piece.double()
        return

    def interval(piece: torch.Tensor) -> torch.Tensor:
        # rises with the value, whatever rounding does, so that runs cannot overlap
        share = (piece.double() - low) / (high - low)
        return (share * _BINS_PER_SPLIT).clamp(max=_BINS_PER_SPLIT - 1).to(torch.int32)

    counts = [0] * _BINS_PER_SPLIT
    for piece in pieces:
        more = torch.bincount(interval(piece), minlength=_BINS_PER_SPLIT).tolist()
        counts = [a + b for a, b in zip(counts, more, strict=True)]
    first = 0
    while first < _BINS_PER_SPLIT:
        end, held = first + 1, counts[first]
        while end < _BINS_PER_SPLIT and held + counts[end] <= limit:
            held += counts[end]
            end += 1
        if held:
            chosen = ((i := interval(p)).ge(first) & i.lt(end) for p in pieces)
            inside = tuple(p[c] for p, c in zip(pieces, chosen, strict=True))
            yield from _sorted_runs(tuple(p for p in inside if len(p)), limit)
        first = end
