"""A stack of weights on its grid while it is being improved."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeq_plugin.core.grid import Grid, dequantize


@dataclass(frozen=True)
class Rounded:
    """Codes, the grid that they are on, and which way the loss would have each weight move.

    Attributes:
        codes: ``[experts, out, in]`` int8.
        scale: ``[experts, out, groups]``, not 0.
        zero_point: ``[experts, out, groups]``.
        pull: ``[experts, out, in]``, ``D @ H`` with what is lost ``D = weight - points`` and the
            Hessian: minus the gradient of the loss ``trace(D @ H @ D.T) / 2``. It costs a product
            with the whole Hessian, which is why it is handed on.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    pull: torch.Tensor

    @classmethod
    def of(
        cls,
        weight: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        hessian: torch.Tensor,
        grid: Grid,
    ) -> Rounded:
        """Compute the pull for a weight and its ``[experts, in, in]`` float Hessians."""
        points = dequantize(codes, scale, zero_point, grid).to(hessian.dtype)
        return cls(codes, scale, zero_point, (weight.to(hessian.dtype) - points) @ hessian)

    def points(self, grid: Grid) -> torch.Tensor:
        """Return ``[experts, out, in]``, the weights that the codes stand for."""
        return dequantize(self.codes, self.scale, self.zero_point, grid)

    def losses(self, weight: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Return ``[experts, out]``, ``d @ H @ d / 2`` of what each row ``d`` has lost."""
        change = weight.to(self.pull.dtype) - self.points(grid).to(self.pull.dtype)
        return (change * self.pull).sum(2) / 2
