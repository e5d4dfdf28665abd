"""Refit the scales of a row to its codes.

With codes fixed, the rounded row is linear in its scales ``s``, one per group, and so the loss
``d @ H @ d`` of what is lost is a quadratic in them: least squares over all groups of the row
together, which knows what groups do to each other.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moeq_plugin.core.grid import Grid
from moeq_plugin.core.parts import parts
from moeq_plugin.core.rounded import Rounded

_IN_CACHE = 2**20


def refit_scales(
    weight: torch.Tensor, rounded: Rounded, hessian: torch.Tensor, grid: Grid
) -> Rounded:
    """Return the scales that lose least with these codes, where that beats those given.

    A row keeps its scales unless its loss falls with the new ones as they are stored, rounded to
    their dtype; a group keeps its scale where the new one would be 0 or of the other sign.

    Args:
        weight: ``[experts, out, in]``.
        rounded: what to improve, for that weight and that Hessian.
        hessian: ``[experts, in, in]`` float, positive definite.
        grid: the grid's description.

    Returns:
        The same codes and zero points with other scales, in the same dtype.

    Example:
        >>> weight, codes = torch.tensor([[[0.9, -2.1]]]), torch.tensor([[[1, -2]]])
        >>> ones, zeros, hessian = torch.ones(1, 1, 1), torch.zeros(1, 1, 1), torch.eye(2)[None]
        >>> rounded = Rounded.of(weight, codes, ones, zeros, hessian, Grid(3))
        >>> refit_scales(weight, rounded, hessian, Grid(3)).scale
        tensor([[[1.0200]]])
    """
    scale = torch.empty_like(rounded.scale)
    for experts, rows in parts(weight, _IN_CACHE):
        scale[experts, rows] = _least_squares(
            rounded.codes[experts, rows],
            rounded.scale[experts, rows],
            rounded.zero_point[experts, rows],
            rounded.pull[experts, rows],
            hessian[experts],
        )
    refitted = Rounded.of(weight, rounded.codes, scale, rounded.zero_point, hessian, grid)
    falls = (refitted.losses(weight, grid) < rounded.losses(weight, grid))[..., None]
    return replace(
        rounded,
        scale=torch.where(falls, scale, rounded.scale),
        pull=torch.where(falls, refitted.pull, rounded.pull),
    )


def _least_squares(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    pull: torch.Tensor,
    hessian: torch.Tensor,
) -> torch.Tensor:
    """Return the best scales, and those given where they cannot be told or turn the grid around."""
    in_groups = codes.unflatten(2, (scale.shape[2], -1)).to(hessian.dtype)
    in_groups = in_groups - zero_point[..., None]
    system = _normal_equations(in_groups, hessian)
    factor, info = torch.linalg.cholesky_ex(system)
    gradient = (pull.view_as(in_groups) * in_groups).sum(3)
    shift = torch.cholesky_solve(gradient[..., None], factor)[..., 0]
    found = (scale.to(hessian.dtype) + shift).to(scale.dtype)
    is_usable = found.isfinite() & (found * scale.sign() > 0) & (info == 0)[..., None]
    return torch.where(is_usable, found, scale)


def _normal_equations(in_groups: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return what the scales of a row do to each other's loss.

    Args:
        in_groups: ``[experts, out, groups, columns of a group]``, what a scale is multiplied with.
        hessian: ``[experts, in, in]``.

    Returns:
        ``[experts, out, groups, groups]``, the lower triangle of positive definite matrices.
    """
    num_groups, group_size = in_groups.shape[2:]
    steps = in_groups.flatten(2)
    system = steps.new_zeros(*in_groups.shape[:3], num_groups)
    for k in range(num_groups):
        end = (k + 1) * group_size
        product = in_groups[:, :, k] @ hessian[:, end - group_size : end, :end]
        product = product.mul_(steps[:, :, :end]).unflatten(2, (k + 1, group_size))
        torch.sum(product, 3, out=system[:, :, k, : k + 1])
    # a group whose codes all mean 0 has no say; its scale stays
    diagonal = system.diagonal(dim1=2, dim2=3)
    diagonal[diagonal == 0] = 1
    return system
