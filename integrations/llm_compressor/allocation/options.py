"""The schemes that bit allocation may choose from, by name, and the bytes that each of them stores.

``W4A16`` and the other names of compressed-tensors' presets mean what they mean there;
``W3A16_G64`` is a preset with another group size, ``UNQUANTIZED`` keeps 16 bits. ``CB6D2_G64x32``
is a codebook: indices of 6 bits for 2 neighbouring columns each, 64 rows times 32 columns share it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import cache

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import (
    ActivationOrdering,
    QuantizationScheme,
    QuantizationStrategy,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from torch import nn

from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.core.packed_codebook import PackedFormat
from moeq_plugin.core.scheme_words import codebook_in_words, codebook_named
from moeq_plugin.integrations.llm_compressor.schemes import describe, grid_of

UNQUANTIZED = "UNQUANTIZED"
# what ordinary kernels of vLLM serve; 2 and 3 bits need Humming kernels, and are asked for by name
DEFAULT_OPTIONS = ("W4A16", "W8A16")
_GROUP_SIZE = re.compile(r"_G(\d+)$")


@dataclass(frozen=True)
class Option:
    """One choice for the weights of a linear.

    Attributes:
        name: such as ``W3A16_G64``.
        scheme: of a grid, without targets; ``None`` for codebooks and 16 bits.
        codebook: format of a codebook, ``None`` for the others.
    """

    name: str
    scheme: QuantizationScheme | None
    codebook: CodebookFormat | None = None

    @property
    def is_exact(self) -> bool:
        """Tell whether weights stay what they are."""
        return self.scheme is None and self.codebook is None

    def fits(self, linear: nn.Linear) -> bool:
        """Tell whether groups, or the vectors of a codebook, divide the linear's input columns."""
        if self.codebook is not None:
            return linear.weight.shape[1] % self.codebook.vector_dim == 0
        args = self.scheme.weights if self.scheme is not None else None
        return args is None or not args.group_size or linear.weight.shape[1] % args.group_size == 0

    def num_bytes(self, linear: nn.Linear) -> int:
        """Return the bytes of all tensors that a checkpoint stores for the linear's weight.

        Where the option does not fit, the linear keeps what it has.
        """
        if not self.fits(linear):
            return int(linear.weight.nbytes)
        if self.codebook is not None:
            rows, columns = linear.weight.shape
            return 4 * PackedFormat.to_store(self.codebook, linear.weight.dtype).num_words(
                (rows, columns)
            )
        return _stored_bytes(self.name, tuple(linear.weight.shape), linear.weight.dtype)

    def describe(self) -> str:
        """Return in words what weights are stored in."""
        if self.codebook is not None:
            return codebook_in_words(*astuple(self.codebook))
        args = self.scheme.weights if self.scheme is not None else None
        return describe(args) if args is not None else UNQUANTIZED

    def for_targets(self, targets: list[str]) -> QuantizationScheme:
        """Return the scheme for these targets.

        Raises:
            ValueError: for codebooks, which are no scheme of the host's, and for 16 bits, which
                are what is left where no scheme is attached.
        """
        if self.scheme is None:
            raise ValueError(f"{self.name} is no scheme: put {targets} into `ignore`")
        return self.scheme.model_copy(update={"targets": targets}, deep=True)


def parse_options(names: Iterable[str], weight_observer: str | None = None) -> list[Option]:
    """Return the options with these names.

    Args:
        names: presets of compressed-tensors, ``_G<group size>`` appended where wanted; codebooks.
        weight_observer: the host's observer that chooses scales, ``None`` for its default.

    Raises:
        ValueError: for unknown, repeated or too few names, and for grids that are not integers.
    """
    names = list(names)
    if len(names) < 2 or len(set(names)) != len(names):
        raise ValueError(f"options must be at least two different schemes, got {names}")
    return [parse_option(name, weight_observer) for name in names]


@cache
def parse_option(name: str, weight_observer: str | None = None) -> Option:
    """Return one option; arguments as in :func:`parse_options`.

    Raises:
        ValueError: if the name is unknown, or means neither an integer grid nor a codebook.
    """
    if name == UNQUANTIZED:
        return Option(name, None)
    if fields := codebook_named(name):
        return Option(name, None, CodebookFormat(*fields))
    preset = _GROUP_SIZE.sub("", name)
    if preset not in PRESET_SCHEMES:
        near = difflib.get_close_matches(preset.upper(), PRESET_SCHEMES, n=3)
        raise ValueError(
            f"{name!r} is not an option; did you mean {near or sorted(PRESET_SCHEMES)}? An option "
            "is a preset scheme, with _G64 or the like for another group size, a codebook such as "
            f"CB6D2_G64x32, or {UNQUANTIZED}."
        )
    scheme = preset_name_to_scheme(preset, ["Linear"])
    args = scheme.weights
    if args is None or grid_of(args) is None:
        raise ValueError(f"option {name!r} has no integer weights along input columns")
    size = _GROUP_SIZE.search(name)
    if size is not None:
        args.strategy, args.group_size = QuantizationStrategy.GROUP, int(size[1])
    # what the host's GPTQModifier would fill in: measured is what will be attached
    args.actorder, args.observer = ActivationOrdering.STATIC, weight_observer or args.observer
    return Option(name, scheme)


@cache
def _stored_bytes(name: str, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Measure with the host's own compressor what it stores for a weight of this shape."""
    # zeros do: what is stored depends on shapes and dtypes alone
    weight = torch.zeros(shape, dtype=dtype)
    scheme = parse_option(name).scheme
    if scheme is None or scheme.weights is None:
        return weight.nbytes
    groups = shape[1] // (scheme.weights.group_size or shape[1])
    tensors = {"weight": weight, "weight_scale": torch.ones(shape[0], groups, dtype=dtype)}
    if not scheme.weights.symmetric:
        tensors["weight_zero_point"] = torch.zeros(shape[0], groups, dtype=torch.int8)
    form = scheme.format or infer_module_format(nn.Linear, scheme).value
    stored = BaseCompressor.get_value_from_registry(form).compress(tensors, scheme)
    return sum(tensor.nbytes for tensor in stored.values())
