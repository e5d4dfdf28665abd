"""Linears whose weight stays packed on its grid, as compressed-tensors' ``pack-quantized`` has it.

compressed-tensors decompresses such weights when the model first runs, and the memory is that of
the 16-bit model from then on. Here they are multiplied as they are.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import linear

from moeq_plugin.core.bit_packing import unpack_rows
from moeq_plugin.kernels.products import Product, can_multiply, grid_product
from moeq_plugin.models.kept import Kept


class GridLinear(nn.Module):
    """``nn.Linear`` with packed codes, a scale for each group of columns, and zero points.

    The tensors have compressed-tensors' names and layout, so that they load and save as such.

    Args:
        packed: ``[out, words]`` int32.
        scale: ``[out, groups]``, whose dtype is the weight's.
        zero_point: ``[words, groups]`` int32, packed along the rows; ``None`` if symmetric.
        shape: ``(out, in)``.
        num_bits: of a code, 1 to 8.
        bias: likewise as in ``nn.Linear``.
    """

    weight_zero_point: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        packed: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        shape: tuple[int, int],
        num_bits: int,
        bias: nn.Parameter | None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.num_bits = num_bits
        self.weight_packed = nn.Parameter(packed, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        zeros = None if zero_point is None else nn.Parameter(zero_point, requires_grad=False)
        self.register_parameter("weight_zero_point", zeros)
        self.weight_shape = nn.Parameter(torch.tensor(shape), requires_grad=False)
        self.bias = bias
        self._product: Kept[Product | None] = Kept()
        self._codes: Kept[torch.Tensor] = Kept()

    @property
    def weight(self) -> torch.Tensor:
        """Return what the codes stand for, ``[out, in]`` in the dtype of the scales."""
        return self._decoded(self._unpack())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias``; the weight is decoded as it is multiplied."""
        product = None
        if x.dtype == self.weight_scale.dtype and can_multiply(x):
            product = self._product.of(self._make_product, self.weight_packed, self.weight_scale)
        if product is None:
            codes = self._codes.of(self._unpack, self.weight_packed)
            return linear(x, self._decoded(codes), self.bias)
        result = product(x)
        return result if self.bias is None else result + self.bias

    def unpacked(self) -> nn.Linear:
        """Return the linear that this one stands for."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.weight.detach(), requires_grad=False)
        plain.register_parameter("bias", self.bias)
        return plain

    def _unpack(self) -> torch.Tensor:
        """Return ``[out, in]`` uint8 codes."""
        codes = unpack_rows(self.weight_packed, self.num_bits, self.in_features)
        return codes.to(torch.uint8)

    def _zeros(self) -> torch.Tensor | None:
        """Return ``[out, groups]`` uint8, the codes that stand for 0."""
        if self.weight_zero_point is None:
            return None
        zeros = unpack_rows(self.weight_zero_point.detach().T, self.num_bits, self.out_features).T
        return zeros.to(torch.uint8).contiguous()

    def _decoded(self, codes: torch.Tensor) -> torch.Tensor:
        zeros = self._zeros()
        middle = 1 << (self.num_bits - 1)
        steps = codes.view(self.out_features, self.weight_scale.shape[1], -1).short()
        steps = steps - (middle if zeros is None else zeros[..., None].short())
        scaled = steps.to(self.weight_scale.dtype) * self.weight_scale[..., None]
        return scaled.flatten(1)

    def _make_product(self) -> Product | None:
        return grid_product(
            self.weight_packed.detach(),
            self.weight_scale.detach(),
            self._zeros(),
            (self.out_features, self.in_features),
            self.num_bits,
        )
