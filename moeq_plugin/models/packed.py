"""Modules that keep a weight in codebook format, bit-packed, and look it up when they run.

``codes`` (int32 words of indices), ``codebook`` (int8) and ``scale`` are what a checkpoint holds.
The formats of a model's packed modules are what its configuration holds; both together rebuild it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import linear

from moeq_plugin.core.codebook import (
    CodebookFormat,
    CodebookWeight,
    decode,
    pack_codes,
    unpack_codes,
)
from moeq_plugin.models.rwkv_parts import ElementwiseScale


class PackedWeight(nn.Module):
    """A weight in codebook format.

    Args:
        replaced: the plain weight; only its shape, dtype and device count.
        rows: of the matrix that it is encoded as; an element-wise weight is one row.
        form: its format.
    """

    def __init__(self, replaced: torch.Tensor, rows: int, form: CodebookFormat) -> None:
        super().__init__()
        self.weight_shape, self.form = replaced.shape, form
        self.matrix_shape = (rows, replaced.numel() // rows)
        codebooks = form.grid(self.matrix_shape)
        words = -(-replaced.numel() // (32 * form.vector_dim)) * form.index_bits
        entries = (*codebooks, form.num_centroids, form.vector_dim)
        self.codes = _constant(replaced.new_empty(words, dtype=torch.int32))
        self.codebook = _constant(replaced.new_empty(entries, dtype=torch.int8))
        self.scale = _constant(replaced.new_empty(codebooks))

    def fill(self, encoded: CodebookWeight) -> None:
        """Take over an encoded weight of this shape and format."""
        self.codes.copy_(pack_codes(encoded.codes, self.form.index_bits))
        self.codebook.copy_(encoded.codebook)
        self.scale.copy_(encoded.scale)

    @property
    def weight(self) -> torch.Tensor:
        """Look the weight up, in its shape and in the dtype of ``scale``."""
        rows, columns = self.matrix_shape
        shape = (rows, columns // self.form.vector_dim)
        codes = unpack_codes(self.codes, self.form.index_bits, shape)
        return decode(codes, self.codebook, self.scale, self.form).view(self.weight_shape)


class CodebookLinear(PackedWeight):
    """``nn.Linear`` that looks its weight up; ``bias`` is kept as it was."""

    def __init__(self, replaced: nn.Linear, form: CodebookFormat) -> None:
        super().__init__(replaced.weight, len(replaced.weight), form)
        self.out_features, self.in_features = replaced.weight.shape
        self.bias = replaced.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias``."""
        return linear(x, self.weight, self.bias)

    def unpacked(self) -> nn.Linear:
        """Return the linear that this one stands for."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.weight.detach(), requires_grad=False)
        plain.bias = self.bias
        return plain


class CodebookScale(PackedWeight):
    """:class:`ElementwiseScale` that looks its weight up."""

    def __init__(self, replaced: ElementwiseScale, form: CodebookFormat) -> None:
        super().__init__(replaced.weight, 1, form)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x * weight``."""
        return x * self.weight

    def unpacked(self) -> ElementwiseScale:
        """Return the module that this one stands for."""
        plain = ElementwiseScale(*self.weight_shape, first=0, last=0)
        plain.weight = nn.Parameter(self.weight.detach(), requires_grad=False)
        return plain


def packed_modules(model: nn.Module) -> dict[str, CodebookLinear | CodebookScale]:
    """Return the packed modules of a model by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CodebookLinear | CodebookScale)
    }


def pack_modules(model: nn.Module, forms: Mapping[str, CodebookFormat]) -> None:
    """Replace modules by packed ones whose content is still to be loaded, in place.

    Args:
        model: in any dtype and on any device; packed weights take those of the plain ones.
        forms: the format of each module by name.

    Raises:
        ValueError: if a name is that of no module, or of one that cannot be packed.
    """
    modules = dict(model.named_modules())
    for name, form in forms.items():
        module = modules.get(name)
        if isinstance(module, nn.Linear):
            packed: PackedWeight = CodebookLinear(module, form)
        elif isinstance(module, ElementwiseScale):
            packed = CodebookScale(module, form)
        else:
            found = type(module).__name__ if module is not None else "no module of that name"
            raise ValueError(
                f"{name} should be a linear or an element-wise weight in codebook format, but the "
                f"model has {found} there: the checkpoint belongs to another architecture"
            )
        model.set_submodule(name, packed)


def unpack_modules(model: nn.Module) -> None:
    """Replace packed modules by plain ones with the looked-up weights, in place."""
    for name, module in packed_modules(model).items():
        model.set_submodule(name, module.unpacked())


def _constant(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
