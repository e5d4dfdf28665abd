"""Weighted k-means against brute force and what weights have to mean."""

import itertools

import pytest
import torch

from moeq_plugin.core import kmeans
from moeq_plugin.core.kmeans import fit_centroids, lloyd_step, nearest


def problem(problems=2, points=40, dim=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(problems, points, dim, generator=g, dtype=torch.float64)
    return p, torch.rand(problems, points, dim, generator=g, dtype=torch.float64) + 0.1


def loss(points, weights, centroids):
    """Return the loss of each problem, point by point."""
    result = []
    for p, w, c in zip(points, weights.expand_as(points), centroids, strict=True):
        distances = [[(wi * (pi - ck) ** 2).sum() for ck in c] for pi, wi in zip(p, w, strict=True)]
        result.append(sum(min(of_point) for of_point in distances))
    return torch.stack(result)


def best_loss(points, weights, num_centroids):
    """Return the least loss over all ways to cut the sorted scalars into intervals."""
    order = points.argsort()
    p, w = points[order], weights[order]
    cuts = itertools.combinations_with_replacement(range(len(p) + 1), num_centroids - 1)
    losses = []
    for cut in cuts:
        total = 0.0
        for start, end in itertools.pairwise((0, *cut, len(p))):
            if end > start:
                x, a = p[start:end], w[start:end]
                total += (a * (x - (a * x).sum() / a.sum()) ** 2).sum().item()
        losses.append(total)
    return min(losses)


@pytest.mark.parametrize("num_centroids", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_scalars_get_the_best_of_all_codebooks(num_centroids, seed):
    points, weights = problem(points=9, seed=seed)

    found = loss(points, weights, fit_centroids(points, weights, num_centroids))

    best = [
        best_loss(p, w, num_centroids) for p, w in zip(points[..., 0], weights[..., 0], strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(best, dtype=torch.float64))


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("constant", [1e-6, 1.0, 300.0])
def test_equal_weights_of_any_size_are_no_weights(dim, constant):
    points, _ = problem(dim=dim)
    ones = torch.ones(2, 40, 1, dtype=torch.float64)

    found = fit_centroids(points, constant * ones, 4)

    torch.testing.assert_close(found, fit_centroids(points, ones, 4))


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_a_factor_on_all_weights_changes_nothing(dim, factor):
    points, weights = problem(dim=dim)

    torch.testing.assert_close(
        fit_centroids(points, factor * weights, 4), fit_centroids(points, weights, 4)
    )


@pytest.mark.parametrize("dim", [1, 2])
def test_an_integer_weight_counts_as_copies(dim):
    points, _ = problem(problems=1, points=20, dim=dim)
    copies = torch.randint(0, 4, (20,), generator=torch.Generator().manual_seed(1))
    replicated = points[0].repeat_interleave(copies, 0)[None]

    weighted = fit_centroids(points, copies.double()[None, :, None], 5)

    ones = torch.ones(1, int(copies.sum()), 1, dtype=torch.float64)
    torch.testing.assert_close(weighted, fit_centroids(replicated, ones, 5))


@pytest.mark.parametrize("dim", [1, 2])
def test_points_without_weight_move_no_centroid(dim):
    points, weights = problem(dim=dim)
    far = torch.full((2, 3, dim), 100.0, dtype=torch.float64)
    nothing = torch.zeros(2, 3, dim, dtype=torch.float64)

    found = fit_centroids(torch.cat([points, far], 1), torch.cat([weights, nothing], 1), 4)

    torch.testing.assert_close(found, fit_centroids(points, weights, 4))


@pytest.mark.parametrize("dim", [1, 2, 4])
@pytest.mark.parametrize("num_centroids", [5, 8])
def test_as_many_centroids_as_distinct_points_leave_no_error(dim, num_centroids):
    distinct, _ = problem(points=5, dim=dim)
    points = distinct[:, torch.arange(40) % 5]
    weights = torch.ones_like(points)

    centroids = fit_centroids(points, weights, num_centroids)

    assert centroids.shape == (2, num_centroids, dim)
    assert centroids.isfinite().all()
    assert loss(points, weights, centroids).max() < 1e-20


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_no_step_raises_the_loss(dim):
    points, weights = problem(dim=dim)
    centroids = points[:, :4].clone()
    losses = [loss(points, weights, centroids)]

    for _ in range(8):
        centroids = lloyd_step(points, weights, centroids)
        losses.append(loss(points, weights, centroids))

    assert all((b <= a + 1e-12).all() for a, b in itertools.pairwise(losses))
    assert (losses[-1] < losses[0]).all()


def test_a_step_takes_the_weighted_mean():
    points = torch.tensor([[[0.0], [1.0], [10.0]]])
    weights = torch.tensor([[[0.001], [0.003], [0.5]]])

    moved = lloyd_step(points, weights, torch.tensor([[[0.0], [9.0]]]))

    torch.testing.assert_close(moved, torch.tensor([[[0.75], [10.0]]]))


def test_a_centroid_that_nobody_chooses_stays():
    points, weights = problem(problems=1)
    centroids = torch.tensor([[[0.0], [50.0]]], dtype=torch.float64)

    assert lloyd_step(points, weights, centroids)[0, 1] == 50


def test_problems_do_not_influence_each_other():
    points, weights = problem(problems=3, dim=2)

    together = fit_centroids(points, weights, 4)

    # the start draws the same numbers for every problem, alone or not
    alone = torch.cat([fit_centroids(points[[i]], weights[[i]], 4) for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_one_weight_per_point_counts_for_all_its_coordinates():
    points, weights = problem(dim=3)

    found = fit_centroids(points, weights[..., :1], 4)

    torch.testing.assert_close(
        found, fit_centroids(points, weights[..., :1].expand(-1, -1, 3).clone(), 4)
    )


def test_vectors_are_clustered_better_than_by_chance():
    points, weights = problem(points=400, dim=2)

    found = loss(points, weights, fit_centroids(points, weights, 8))

    assert (found < 0.9 * loss(points, weights, points[:, :8])).all()


@pytest.mark.parametrize("count", [1, 3, 256, 257, 600])
@pytest.mark.parametrize("num_centroids", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_is_the_first_of_those_that_are_nearest(count, num_centroids, dtype):
    g = torch.Generator().manual_seed(count)
    # few whole numbers, of which sums are exact, so that many centroids are equally near
    points = torch.randint(-3, 4, (3, count, 2), generator=g).to(dtype)
    weights = torch.randint(0, 3, (3, count, 2), generator=g).to(dtype)
    centroids = torch.randint(-3, 4, (3, num_centroids, 2), generator=g).to(dtype)

    found = nearest(points, weights, centroids)

    for problem, of in enumerate(found.tolist()):
        for p, w, index in zip(points[problem], weights[problem], of, strict=True):
            distances = [(w * (p - c) ** 2).sum().item() for c in centroids[problem]]
            assert index == distances.index(min(distances))


def test_large_tables_are_cut_up_without_a_trace(monkeypatch):
    points, weights = problem(problems=5, points=30)
    pairs, centroids = problem(problems=5, points=30, dim=2)[0], torch.randn(5, 4, 2).double()
    exact, chosen = fit_centroids(points, weights, 4), nearest(pairs, weights, centroids)

    monkeypatch.setattr(kmeans, "_TABLE_ELEMENTS", 100)

    assert torch.equal(fit_centroids(points, weights, 4), exact)
    assert torch.equal(nearest(pairs, weights, centroids), chosen)


def test_many_scalars_are_iterated_and_hardly_worse_than_the_best(monkeypatch):
    points, weights = problem(points=200)
    best = loss(points, weights, fit_centroids(points, weights, 8))

    monkeypatch.setattr(kmeans, "MAX_EXACT_POINTS", 100)
    found = loss(points, weights, fit_centroids(points, weights, 8))

    assert (best <= found + 1e-12).all()
    assert (found < 1.5 * best).all()


@pytest.mark.parametrize(
    ("points", "weights", "message"),
    [
        (torch.zeros(4, 1), torch.ones(4, 1), r"points must be \[problems, points, dim\]"),
        (torch.zeros(1, 4, 2), torch.ones(1, 3, 2), r"got \[1, 4, 2\] and \[1, 3, 2\]"),
        (torch.zeros(1, 1, 1), torch.tensor([[[-0.5]]]), "got a minimum of -0.5"),
    ],
    ids=["matrix", "lengths", "negative"],
)
def test_refuses(points, weights, message):
    with pytest.raises(ValueError, match=message):
        fit_centroids(points, weights, 2)
