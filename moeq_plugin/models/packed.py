"""Modules that keep a weight in codebook format, bit-packed, and look it up when they run.

A checkpoint holds one tensor, ``packed``, for each of them, and its configuration their formats;
both together rebuild them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod

import torch
from torch import nn
from torch.nn.functional import linear, pad

from moeq_plugin.core.codebook import (
    CodebookFormat,
    CodebookWeight,
    pack_codes,
    unpack_codes,
)
from moeq_plugin.models.elementwise import ElementwiseScale

FORMAT_VERSION = 2  # of what PackedFormat packs, and of the configuration that lists the formats


@dataclass(frozen=True)
class PackedFormat(CodebookFormat):
    """A codebook format, and how a weight in it becomes one int32 tensor.

    Indices come first, 32 of them in ``index_bits`` words, then scales, then codebooks, then zeros
    up to a whole word. One tensor, because each takes 100 bytes of a safetensors file's index.

    Attributes:
        scale_dtype: name of the dtype that scales are stored in.
    """

    scale_dtype: str = field(kw_only=True)

    @classmethod
    def of(cls, weight: CodebookWeight) -> PackedFormat:
        """Return the format that stores a weight exactly."""
        scale_dtype = str(weight.scale.dtype).removeprefix("torch.")
        return cls(**asdict(weight.form) | {"scale_dtype": scale_dtype})

    def sizes(self, shape: tuple[int, int]) -> list[int]:
        """Return the bytes of indices, scales, codebooks and padding of a matrix of ``shape``."""
        scale_dtype: torch.dtype = getattr(torch, self.scale_dtype)
        words = -(-prod(shape) // (32 * self.vector_dim)) * self.index_bits
        codebooks = prod(self.grid(shape))
        scales = codebooks * scale_dtype.itemsize
        entries = codebooks * self.num_centroids * self.vector_dim
        return [4 * words, scales, entries, -(scales + entries) % 4]

    def num_words(self, shape: tuple[int, int]) -> int:
        """Return the length of the tensor that stands for a matrix of ``shape``."""
        return sum(self.sizes(shape)) // 4

    def pack(self, weight: CodebookWeight) -> torch.Tensor:
        """Return the ``[words]`` int32 tensor that stands for a weight of this format."""
        parts = pack_codes(weight.codes, self.index_bits), weight.scale, weight.codebook
        stored = torch.cat([part.flatten().view(torch.uint8) for part in parts])
        return pad(stored, (0, -len(stored) % 4)).view(torch.int32)

    def unpack(self, packed: torch.Tensor, shape: tuple[int, int]) -> CodebookWeight:
        """Return the weight of a matrix of ``shape``, the inverse of :meth:`pack`."""
        words, scale, codebook, _ = packed.view(torch.uint8).split(self.sizes(shape))
        vectors, codebooks = (shape[0], shape[1] // self.vector_dim), self.grid(shape)
        return CodebookWeight(
            unpack_codes(words.view(torch.int32), self.index_bits, vectors),
            codebook.view(torch.int8).view(*codebooks, self.num_centroids, self.vector_dim),
            scale.view(getattr(torch, self.scale_dtype)).view(codebooks),
            self,
        )


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

    def fill(self, encoded: CodebookWeight) -> None:
        """Take over an encoded weight of this shape and format."""
        self.packed.copy_(self.form.pack(encoded))

    @property
    def weight(self) -> torch.Tensor:
        """Look the weight up, in its shape and in the model's dtype."""
        stored = self.form.unpack(self.packed, self.matrix_shape)
        encoded = replace(stored, scale=stored.scale.to(self.like.dtype))
        return encoded.decode().view(self.weight_shape)


class CodebookLinear(PackedWeight):
    """``nn.Linear`` that looks its weight up; ``bias`` is kept as it was."""

    def __init__(self, replaced: nn.Linear, form: PackedFormat) -> None:
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


def unpack_modules(model: nn.Module) -> None:
    """Replace packed modules by plain ones with the looked-up weights, in place."""
    for name, module in packed_modules(model).items():
        model.set_submodule(name, module.unpacked())
