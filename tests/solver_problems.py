"""Small problems for solvers, and their losses in float64."""

import torch

from moeq_plugin.core.code_descent import descend_codes
from moeq_plugin.core.grid import Grid, choose_grid, dequantize, quantize
from moeq_plugin.core.rounded import Rounded
from moeq_plugin.core.scale_refit import refit_scales

GRIDS = [Grid(4, 4), Grid(2), Grid(3, 8, symmetric=False)]
GRID_NAMES = ["g4", "channel", "asymmetric"]


def problem(experts=3, rows=6, columns=16, tokens=64, seed=0, dtype=torch.float32):
    """Return weights ``[experts, rows, columns]`` and positive definite second moments."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, rows, columns, generator=rng)
    mixing = torch.randn(columns, columns, generator=rng)
    inputs = torch.randn(experts, tokens, columns, generator=rng) @ mixing
    hessian = 2 * inputs.transpose(1, 2) @ inputs
    hessian += 0.01 * hessian.diagonal(dim1=1, dim2=2).mean() * torch.eye(columns)
    return weight.to(dtype), hessian


def nearest(weight, grid):
    """Return scale, zero point and codes of rounding to nearest."""
    scale, zero_point = choose_grid(weight, grid)
    return scale, zero_point, quantize(weight, scale, zero_point, grid)


def refit(weight, codes, scale, zero_point, hessian, grid):
    """Return refitted scales."""
    rounded = Rounded.of(weight, codes, scale, zero_point, hessian, grid)
    found = refit_scales(weight, rounded, hessian, grid)
    check_pull(weight, found, hessian, grid)
    assert torch.equal(found.codes, codes)
    return found.scale


def descend(weight, codes, scale, zero_point, hessian, order, grid, **settings):
    """Return codes after a descent."""
    rounded = Rounded.of(weight, codes, scale, zero_point, hessian, grid)
    found = descend_codes(rounded, hessian, order, grid, **settings)
    check_pull(weight, found, hessian, grid)
    assert torch.equal(found.scale, scale)
    return found.codes


def check_pull(weight, rounded, hessian, grid):
    """Check what is handed on from step to step against float64."""
    change = weight.double() - rounded.points(grid).double()
    pull = change @ hessian.double()
    assert ((rounded.pull - pull).abs() <= 1e-5 * pull.abs().max()).all()
    torch.testing.assert_close(
        rounded.losses(weight, grid).double(), (change * pull).sum(2) / 2, rtol=1e-4, atol=0
    )


def loss(weight, codes, scale, zero_point, hessian, grid):
    """Return ``[experts, rows]`` in float64, of the points as they are stored."""
    change = weight.double() - dequantize(codes, scale, zero_point, grid).double()
    return ((change @ hessian.double()) * change).sum(2) / 2


def orders(experts, columns, seed=0):
    """Return a random order of columns for each expert."""
    rng = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(columns, generator=rng) for _ in range(experts)])


def output_moments(experts=3, rows=6, tokens=256, seed=0):
    """Return positive definite second moments ``[experts, rows, rows]`` of correlated outputs."""
    rng = torch.Generator().manual_seed(100 + seed)
    mixing = torch.randn(rows, rows, generator=rng)
    gradients = torch.randn(experts, tokens, rows, generator=rng) @ mixing
    return gradients.transpose(1, 2) @ gradients


def whole_loss(weight, rounded, hessian, outputs):
    """Return ``[experts]`` in float64, ``trace(G @ D @ H @ D.T)``."""
    change = weight.double() - rounded.double()
    return ((outputs.double() @ change @ hessian.double()) * change).sum((1, 2))
