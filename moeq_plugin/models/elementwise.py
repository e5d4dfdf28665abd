"""Element-wise weights as modules, which can be hooked, quantized and replaced as linears can."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


class ElementwiseScale(nn.Module):
    """Multiply by a learned ``weight`` of any shape that broadcasts.

    A module, not a bare parameter, so that a forward hook sees what the weight is multiplied
    with: ``sum_t x_t**2`` is the cost of an error in ``weight``, as the Hessian is for a linear.

    Args:
        shape: of the weight; channels come last.
        first: initial value of the first channel; those between are equally spaced.
        last: initial value of the last channel.
    """

    def __init__(self, *shape: int, first: float, last: float) -> None:
        super().__init__()
        self._initial = first, last
        self.weight = nn.Parameter(torch.empty(shape))
        self.weight.data.copy_(self.initial())

    def initial(self) -> torch.Tensor:
        """Return the values of a weight that nobody has trained."""
        ramp = torch.linspace(*self._initial, self.weight.shape[-1], device=self.weight.device)
        return ramp.to(self.weight.dtype).expand_as(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x * weight``."""
        return x * self.weight


def elementwise_parameters(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Parameter, ElementwiseScale]]:
    """Yield name, parameter and module of every element-wise weight of a model of ours.

    The module's input, which a forward hook receives, is what the parameter multiplies; its
    trailing dimensions broadcast with the parameter's.
    """
    for name, module in model.named_modules():
        if isinstance(module, ElementwiseScale):
            yield f"{name}.weight", module.weight, module
