"""The quantization scheme that the host has attached to a module, and the grid that it means."""

from __future__ import annotations

from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationStrategy,
    QuantizationType,
)
from torch import nn

from moeq_plugin.core.grid import Grid


def weight_args(module: nn.Module) -> QuantizationArgs | None:
    """Return the weight scheme attached to a module, ``None`` if there is none."""
    scheme = getattr(module, "quantization_scheme", None)
    return scheme.weights if scheme is not None else None


def observes_activations(module: nn.Module) -> bool:
    """Tell whether a scheme needs statistics of all tokens, as static activation scales do."""
    scheme = module.quantization_scheme
    return any(
        args is not None and args.dynamic is not True
        for args in (scheme.input_activations, scheme.output_activations)
    )


def grid_of(args: QuantizationArgs) -> Grid | None:
    """Return the grid of a weight scheme, ``None`` if it is not an integer grid along rows."""
    by_rows = (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
    if args.type != QuantizationType.INT or args.strategy not in by_rows:
        return None
    return Grid(args.num_bits, args.group_size, args.symmetric)


def describe(args: QuantizationArgs) -> str:
    """Return a weight scheme in words, such as ``W4 int symmetric group 128``."""
    symmetry = "symmetric" if args.symmetric else "asymmetric"
    strategy = QuantizationStrategy(args.strategy).value
    group = f"group {args.group_size}" if args.group_size else strategy
    return f"W{args.num_bits} {QuantizationType(args.type).value} {symmetry} {group}"
