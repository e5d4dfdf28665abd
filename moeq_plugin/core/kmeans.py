"""Weighted k-means, many problems at a time.

Minimize ``sum_i sum_j weights[i, j] * (points[i, j] - centroid_of_i[j])^2``: the squared error of
an output if ``weights`` are second moments of what the points are multiplied with. A positive
factor on the weights changes nothing; a weight of ``m`` counts as ``m`` copies of the point.

Scalars have an order, and the best clusters are intervals of it: dynamic programming finds them
exactly. Vectors get Lloyd's iteration from a greedy, seeded k-means++ start. RWKVQuant
(arXiv:2505.03803) iterates in both cases; its released code divides by ``max(1, sum of weights)``,
which draws centroids of small weight toward 0. Here the divisor is the sum itself.
"""

from __future__ import annotations

import torch
from torch.nn.functional import max_pool2d

MAX_EXACT_POINTS = 512  # the exact solution looks at all pairs of points
_STARTS = 3  # candidates per centroid of the greedy start
_TABLE_ELEMENTS = 1 << 24
_POINTS = 256  # whose distances to all centroids are kept in the cache of a core


def fit_centroids(
    points: torch.Tensor,
    weights: torch.Tensor,
    num_centroids: int,
    *,
    iterations: int = 16,
    seed: int = 0,
) -> torch.Tensor:
    """Return ``[problems, num_centroids, dim]`` centroids, in the points' dtype.

    Deterministic: problems do not influence each other, and the start of all of them takes its
    random numbers from ``seed``.

    Args:
        points: ``[problems, points, dim]``.
        weights: ``[problems, points, dim]`` or ``[problems, points, 1]``, not negative. Points of
            weight zero move nothing.
        num_centroids: centroids of each problem. If that is at least the number of distinct
            points, the error is zero.
        iterations: upper limit of Lloyd's iteration, which ends when nothing moves any more.
        seed: of the start.

    Raises:
        ValueError: if shapes disagree or a weight is negative.

    Cost: for scalars and at most ``MAX_EXACT_POINTS`` points ``O(centroids * points^2)``, else
    ``O(iterations * centroids * points * dim)``.
    """
    if points.ndim != 3 or weights.shape not in (points.shape, (*points.shape[:2], 1)):
        raise ValueError(
            "points must be [problems, points, dim] and weights of the same shape or with dim 1, "
            f"got {list(points.shape)} and {list(weights.shape)}"
        )
    if (weights < 0).any():
        raise ValueError(f"weights must be >= 0, got a minimum of {weights.min():.3g}")
    if points.shape[2] == 1 and points.shape[1] <= MAX_EXACT_POINTS:
        at_a_time = max(1, _TABLE_ELEMENTS // (points.shape[1] + 1) ** 2)
        pairs = zip(points.split(at_a_time), weights.split(at_a_time), strict=True)
        return torch.cat([_fit_scalars(p[..., 0], w[..., 0], num_centroids) for p, w in pairs])
    centroids = _start(points, weights, num_centroids, seed)
    for _ in range(iterations):
        moved = lloyd_step(points, weights, centroids)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def lloyd_step(
    points: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor
) -> torch.Tensor:
    """Move every centroid to the weighted mean of the points nearest to it.

    The loss does not rise. A centroid without weight in a coordinate stays where it is.

    Args:
        points: ``[problems, points, dim]``.
        weights: ``[problems, points, dim or 1]``.
        centroids: ``[problems, centroids, dim]``; not modified.
    """
    weights = weights.expand_as(points)
    index = nearest(points, weights, centroids)[..., None].expand_as(points)
    total = torch.zeros_like(centroids).scatter_add_(1, index, weights)
    mean = torch.zeros_like(centroids).scatter_add_(1, index, weights * points) / total
    return torch.where(total > 0, mean, centroids)


def nearest(points: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return ``[problems, points]`` int64, the centroid with the least weighted distance.

    Ties go to the lower index. Shapes as in :func:`lloyd_step`.
    """
    weights = weights.expand_as(points)
    # 2 w x c - w c^2 is large where the distance is small: what is left out, w x^2, all centroids
    # have in common
    by_point = torch.cat([-weights, 2 * weights * points], -1).mT
    by_centroid = torch.cat([centroids.square(), centroids], -1)
    at_a_time = max(1, min(_POINTS, _TABLE_ELEMENTS // (len(points) * centroids.shape[1])))
    return torch.cat([_argmax(by_centroid @ p) for p in by_point.split(at_a_time, 2)], 1)


def _argmax(table: torch.Tensor) -> torch.Tensor:
    """Return ``table.argmax(1)`` of ``[problems, centroids, points]``, the first of equals.

    On CPUs torch goes through ``argmax`` one element at a time. The maximum over a window that is
    as high as the table is the same, and in this order of dimensions is taken of many points at
    once.
    """
    if table.device.type != "cpu":
        return table.argmax(1)
    channels_last = table[:, :, None].permute(0, 3, 1, 2)  # [problems, points, centroids, 1]
    window = (table.shape[1], 1)
    return max_pool2d(channels_last, window, return_indices=True)[1].flatten(1)


def _distance(points: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Return ``[problems, centroids, points]``; exactly 0 where they are the same.

    Args:
        points: ``[problems, dim, points]``.
        weights: ``[problems, dim, points]``.
        centroids: ``[problems, centroids, dim]``.
    """
    distance = points.new_zeros(len(points), centroids.shape[1], points.shape[2])
    for p, w, c in zip(points.unbind(1), weights.unbind(1), centroids.unbind(2), strict=True):
        difference = p[:, None] - c[..., None]
        distance.addcmul_(difference.square_(), w[:, None])
    return distance


def _start(
    points: torch.Tensor, weights: torch.Tensor, num_centroids: int, seed: int
) -> torch.Tensor:
    """Choose points one by one, with a probability that is their share of the error so far.

    Of several candidates the one that leaves the least error is taken. The random number is looked
    up in the cumulative error, so that copies of a point count like its weight.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = weights.expand_as(points)
    # points run last, so that what is done to all of them is done to many at once
    by_coordinate = points.mT.contiguous(), weights.mT.contiguous()
    problem = torch.arange(len(points), device=points.device)
    share = weights.sum(-1)  # of the first centroid, which has no error to go by
    left = torch.full_like(share, torch.inf)
    centroids = []
    for _ in range(num_centroids):
        cumulative = share.cumsum(1)
        draws = torch.rand(_STARTS, generator=generator).to(points)
        index = torch.searchsorted(cumulative, cumulative[:, -1:] * draws, right=True)
        candidates = points[problem[:, None], index.clamp(max=points.shape[1] - 1)]
        leaves = torch.minimum(left[:, None], _distance(*by_coordinate, candidates))
        # how it is summed up decides between candidates that are as good: point by point, as it
        # was in every file so far
        best = leaves.mT.contiguous().sum(1).argmin(1)
        centroids.append(candidates[problem, best])
        share = left = leaves[problem, best]
    return torch.stack(centroids, 1)


def _fit_scalars(points: torch.Tensor, weights: torch.Tensor, num_centroids: int) -> torch.Tensor:
    """Return the best ``[problems, num_centroids, 1]`` centroids of ``[problems, points]``.

    ``best[j, n]``, the least loss of the first ``n`` sorted points with ``j`` clusters, is the
    minimum over ``m`` of ``best[j - 1, m] + loss(m, n)``; empty clusters are allowed.
    """
    ordered, index = points.sort(dim=1)
    p, w = ordered.double(), weights.gather(1, index).double()
    p = p - p[:, :1]  # sums of squares of small numbers cancel less
    mass, first, second = (_prefix_sums(w * p**power) for power in (0, 1, 2))
    tiny = torch.finfo(torch.float64).tiny
    between = [s[:, None, :] - s[:, :, None] for s in (mass, first, second)]
    loss = (between[2] - between[1].square() / between[0].clamp(min=tiny)).clamp(min=0)
    size = loss.shape[1]
    loss.masked_fill_(torch.ones(size, size, device=loss.device).tril(-1).bool(), torch.inf)
    best, choices = loss[:, 0], []
    for _ in range(num_centroids - 1):
        best, choice = (best[:, :, None] + loss).min(dim=1)
        choices.append(choice)
    end = torch.full_like(choices[0][:, :1] if choices else index[:, :1], size - 1)
    centroids: list[torch.Tensor] = []
    for choice in [*reversed(choices), torch.zeros_like(end).expand(-1, size)]:
        begin = choice.gather(1, end)
        total = mass.gather(1, end) - mass.gather(1, begin)
        mean = (first.gather(1, end) - first.gather(1, begin)) / total.clamp(min=tiny)
        # an interval without weight repeats the centroid after it
        empty = centroids[-1] if centroids else torch.zeros_like(mean)
        centroids.append(torch.where(total > 0, mean, empty))
        end = begin
    return (torch.stack(centroids, 1) + ordered[:, :1, None].double()).to(points.dtype)


def _prefix_sums(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))
