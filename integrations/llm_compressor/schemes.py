"""The quantization scheme that the host has attached to a module, and the grid that it means."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationMetadata,
    QuantizationScheme,
    QuantizationStrategy,
    QuantizationType,
    disable_quantization,
    enable_quantization,
)
from llmcompressor.modifiers.quantization.calibration import freeze_module_quantization
from torch import nn

from moeq_plugin.core.grid import Grid
from moeq_plugin.core.scheme_words import scheme_in_words


def weight_of(module: nn.Module) -> torch.Tensor:
    """Return the weight of a module that has one, such as a linear, a norm or an embedding.

    Raises:
        TypeError: for any other module.
    """
    if not isinstance(module.weight, torch.Tensor):
        raise TypeError(f"{type(module).__name__} has no weight")
    return module.weight


def scheme_of(module: nn.Module) -> QuantizationScheme | None:
    """Return the scheme attached to a module, ``None`` if there is none."""
    scheme = getattr(module, "quantization_scheme", None)
    return scheme if isinstance(scheme, QuantizationScheme) else None


def weight_args(module: nn.Module) -> QuantizationArgs | None:
    """Return the weight scheme attached to a module, ``None`` if there is none."""
    scheme = scheme_of(module)
    return scheme.weights if scheme is not None else None


def observes_activations(module: nn.Module) -> bool:
    """Tell whether a scheme needs statistics of all tokens, as static activation scales do."""
    scheme = scheme_of(module)
    activations = (scheme.input_activations, scheme.output_activations) if scheme else ()
    return any(args is not None and args.dynamic is not True for args in activations)


def grid_of(args: QuantizationArgs) -> Grid | None:
    """Return the grid of a weight scheme, ``None`` if it is not an integer grid along rows."""
    by_rows = (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
    if args.type != QuantizationType.INT or args.strategy not in by_rows:
        return None
    return Grid(args.num_bits, args.group_size, args.symmetric)


def describe(args: QuantizationArgs) -> str:
    """Return a weight scheme in words, such as ``W4 symmetric group 128``."""
    return scheme_in_words(
        args.num_bits,
        args.group_size,
        symmetric=args.symmetric,
        is_float=args.type == QuantizationType.FLOAT,
        strategy=QuantizationStrategy(args.strategy).value,
    )


def detach_scheme(module: nn.Module) -> None:
    """Take off what the host attached to a module that was not quantized; its weight stays."""
    freeze_module_quantization(module)  # removes its observers
    QuantizationMetadata.clear_quantization(module)
    for name in ("quantization_status", "quantization_enabled"):
        if hasattr(module, name):
            delattr(module, name)


@contextlib.contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """Run a model, or a part of it, on its weights as they are, schemes or not.

    In the host's basic pipeline schemes are at work while it calibrates. Their scales are not
    initialized then, so what would come out is whatever the memory held.
    """
    at_work = [m for m in model.modules() if getattr(m, "quantization_enabled", False)]
    for module in at_work:
        disable_quantization(module)
    try:
        yield
    finally:
        for module in at_work:
            enable_quantization(module)
