"""Modules that keep a weight in codebook format, bit-packed, and look it up when they run.

A checkpoint holds one tensor, ``packed``, for each of them, and its configuration their formats;
both together rebuild them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import linear

from moeq_plugin.core.codebook import CodebookWeight
from moeq_plugin.core.packed_codebook import PackedFormat
from moeq_plugin.kernels.products import Product, can_multiply, codebook_product
from moeq_plugin.models.elementwise import ElementwiseScale
from moeq_plugin.models.kept import Kept


class PackedWeight(nn.Module):
    """A weight in codebook format.

    Args:
        replaced: the plain weight; only its shape, dtype and device count.
        rows: of the matrix that it is encoded as; an element-wise weight is one row.
        form: its format.
    """

    like: torch.Tensor  # empty; has the weight's dtype, and follows when the model is cast

    def __init__(self, replaced: torch.Tensor, rows: int, form: PackedFormat) -> None:
        super().__init__()
        self.weight_shape, self.form = replaced.shape, form
        self.matrix_shape = (rows, replaced.numel() // rows)
        words = replaced.new_empty(form.num_words(self.matrix_shape), dtype=torch.int32)
        self.packed = nn.Parameter(words, requires_grad=False)
        self.register_buffer("like", replaced.new_empty(0), persistent=False)

    def fill(self, words: torch.Tensor) -> None:
        """Take over what a weight of this shape was packed to in this format, without a copy."""
        self.packed = nn.Parameter(words, requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """Look the weight up, in its shape and in the model's dtype."""
        stored = self.form.unpack(self.packed, self.matrix_shape)
        return _in_dtype(stored, self.like.dtype).decode().view(self.weight_shape)


def _in_dtype(weight: CodebookWeight, dtype: torch.dtype) -> CodebookWeight:
    return replace(weight, scale=weight.scale.to(dtype))


class CodebookLinear(PackedWeight):
    """``nn.Linear`` that looks its weight up; ``bias`` is kept as it was."""

    def __init__(self, replaced: nn.Linear, form: PackedFormat) -> None:
        super().__init__(replaced.weight, len(replaced.weight), form)
        self.out_features, self.in_features = replaced.weight.shape
        self.bias = replaced.bias
        self._product: Kept[Product | None] = Kept()
        self._codes: Kept[CodebookWeight] = Kept()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T + bias``; the weight is looked up as it is multiplied."""
        product = None
        if x.dtype == self.like.dtype and can_multiply(x):
            product = self._product.of(self._make_product, self.packed, self.like)
        if product is None:
            # without a compiled product the codes are kept unpacked: that is what takes longest
            stored = self._codes.of(self._unpack, self.packed)
            return linear(x, _in_dtype(stored, self.like.dtype).decode(), self.bias)
        result = product(x)
        return result if self.bias is None else result + self.bias

    def _make_product(self) -> Product | None:
        shape, dtype = self.matrix_shape, self.like.dtype
        return codebook_product(self.packed.detach(), self.form, shape, dtype)

    def _unpack(self) -> CodebookWeight:
        return self.form.unpack(self.packed.detach(), self.matrix_shape)

    def unpacked(self) -> nn.Linear:
        """Return the linear that this one stands for."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.weight.detach(), requires_grad=False)
        plain.bias = self.bias
        return plain


class CodebookScale(PackedWeight):
    """:class:`ElementwiseScale` that looks its weight up."""

    def __init__(self, replaced: ElementwiseScale, form: PackedFormat) -> None:
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


def pack_modules(model: nn.Module, forms: Mapping[str, PackedFormat]) -> None:
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


def check_packed(model: nn.Module) -> None:
    """Check that what was loaded into packed modules has the size that their formats say.

    Raises:
        ValueError: naming the first tensor that has not.
    """
    for name, module in packed_modules(model).items():
        found, expected = module.packed.shape, module.form.num_words(module.matrix_shape)
        if found != (expected,):
            raise ValueError(
                f"{name}.packed should be [{expected}] for {list(module.weight_shape)} weights in "
                f"{module.form}, but the checkpoint has {list(found)}: its config.json and its "
                "tensors do not belong together, save it again"
            )


@torch.no_grad()
def renew_packed(model: nn.Module) -> None:
    """Bring what was loaded from version 2 of the format into the order of this one, in place."""
    for module in packed_modules(model).values():
        renewed = module.form.from_version_2(module.packed, module.matrix_shape)
        module.packed.copy_(renewed)


def unpack_modules(model: nn.Module) -> None:
    """Replace packed modules by plain ones with the looked-up weights, in place."""
    for name, module in packed_modules(model).items():
        model.set_submodule(name, module.unpacked())
