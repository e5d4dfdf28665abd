"""Refit the scales of a row to its codes.

With codes fixed, the rounded row is linear in its scales ``s``, one per group, and so the loss
``d @ H @ d`` of what is lost is a quadratic in them: least squares over all groups of the row
together, which knows what groups do to each other.
"""

from __future__ import annotations

import torch

from moeq_plugin.core.grid import Grid, dequantize


def refit_scales(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Return the scales that lose least with these codes, where that beats those given.

    A row keeps its scales unless its loss falls with the new ones as they are stored, rounded to
    their dtype; a group keeps its scale where the new one would be 0 or of the other sign.

    Args:
        weight: ``[experts, out, in]``.
        codes: ``[experts, out, in]``, fixed.
        scale: ``[experts, out, groups]``, not 0.
        zero_point: ``[experts, out, groups]``, fixed.
        hessian: ``[experts, in, in]`` float, positive definite.
        grid: the grid's description.

    Returns:
        ``[experts, out, groups]`` in the dtype of ``scale``.

    Example:
        >>> weight, codes = torch.tensor([[[0.9, -2.1]]]), torch.tensor([[[1, -2]]])
        >>> ones, zeros = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
        >>> refit_scales(weight, codes, ones, zeros, torch.eye(2)[None], Grid(3))
        tensor([[[1.0200]]])
    """
    num_groups = scale.shape[2]
    # the systems of all rows at once would take more than the weights where groups are many
    rows = max(1, codes.shape[1] * codes.shape[2] // num_groups**2)
    parts = [
        _refit_rows(
            weight[:, part], codes[:, part], scale[:, part], zero_point[:, part], hessian, grid
        )
        for part in (slice(start, start + rows) for start in range(0, codes.shape[1], rows))
    ]
    return torch.cat(parts, 1)


def row_losses(change: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return ``[experts, out]``, ``d @ H @ d / 2`` of each row ``d`` of ``[experts, out, in]``."""
    return ((change @ hessian) * change).sum(2) / 2


def _refit_rows(
    weight: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    weight = weight.to(hessian.dtype)
    change = weight - dequantize(codes, scale, zero_point, grid).to(hessian.dtype)
    pull = change @ hessian
    of_column = grid.group_of_column(codes.shape[2]).to(codes.device)
    steps = (codes.to(hessian.dtype) - zero_point[..., of_column]).to(hessian.dtype)
    system, gradient = _normal_equations(steps, pull, hessian, scale.shape[2])
    factor, info = torch.linalg.cholesky_ex(system)
    shift = torch.cholesky_solve(gradient[..., None], factor)[..., 0]
    refitted = (scale.to(hessian.dtype) + shift).to(scale.dtype)
    is_usable = refitted.isfinite() & (refitted * scale.sign() > 0) & (info == 0)[..., None]
    refitted = torch.where(is_usable, refitted, scale)
    after = weight - dequantize(codes, refitted, zero_point, grid).to(hessian.dtype)
    falls = row_losses(after, hessian) < (pull * change).sum(2) / 2
    return torch.where(falls[..., None], refitted, scale)


def _normal_equations(
    steps: torch.Tensor, pull: torch.Tensor, hessian: torch.Tensor, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``A`` and ``b`` of ``A @ shift = b``.

    Args:
        steps: ``[experts, out, in]``, what a scale is multiplied with.
        pull: ``[experts, out, in]``, ``d @ H``.
        hessian: ``[experts, in, in]``.
        num_groups: scales per row.

    Returns:
        ``[experts, out, groups, groups]``, positive definite, and ``[experts, out, groups]``.
    """
    in_groups = steps.unflatten(2, (num_groups, -1))
    columns = []
    for k, of_group in enumerate(hessian.unflatten(1, (num_groups, -1)).unbind(1)):
        product = in_groups[:, :, k] @ of_group  # [experts, out, in]
        columns.append((product.unflatten(2, (num_groups, -1)) * in_groups).sum(3))
    system = torch.stack(columns, 3)
    # a group whose codes all mean 0 has no say; its scale stays
    diagonal = system.diagonal(dim1=2, dim2=3)
    diagonal[diagonal == 0] = 1
    return system, (pull.unflatten(2, (num_groups, -1)) * in_groups).sum(3)
