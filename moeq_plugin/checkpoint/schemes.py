"""What a checkpoint's ``quantization_config`` says: schemes, and to which names they apply.

How the two dialects, compressed-tensors and GPTQ, become the same :class:`Scheme` is in
:mod:`moeq_plugin.checkpoint.read_schemes`, how readers look names up in
:mod:`moeq_plugin.checkpoint.lookup`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moeq_plugin.core.scheme_words import scheme_in_words

GPTQ_FORMS = ("gptq", "gptq_v2")
KERNEL_BITS = (4, 8)


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored.

    Attributes:
        form: the format's name; ``gptq`` for that dialect, ``gptq_v2`` where zero points are stored
            as they are and not less 1.
        num_bits: of a code.
        group_size: input columns that share a scale; ``None`` for another strategy.
        symmetric: without zero points.
        is_float: codes are small floats, not integers.
        strategy: group, channel, tensor or block.
        actorder: order of columns while quantizing; only ``group`` leaves a trace in the file.
        has_activations: activations are quantized as well.
    """

    form: str
    num_bits: int
    group_size: int | None = None
    symmetric: bool = True
    is_float: bool = False
    strategy: str = "group"
    actorder: str | None = None
    has_activations: bool = False

    @property
    def needs_humming(self) -> bool:
        """Tell whether neither Marlin nor Triton takes it: they read int4 and symmetric int8."""
        is_common = self.num_bits in KERNEL_BITS and (self.num_bits == 4 or self.symmetric)
        return not (self.is_float or is_common)

    def describe(self) -> str:
        """Return the scheme in words, such as ``W4 symmetric group 128``."""
        words = scheme_in_words(
            self.num_bits,
            self.group_size,
            symmetric=self.symmetric,
            is_float=self.is_float,
            strategy=self.strategy,
        )
        return f"{words} with activations" if self.has_activations else words


def describe(scheme: Scheme | None) -> str:
    """Return a scheme in words, ``None`` being 16 bit."""
    return scheme.describe() if scheme else "16 bit"


@dataclass(frozen=True)
class Group:
    """A scheme and the names, patterns and classes that it is for."""

    targets: tuple[str, ...]
    scheme: Scheme


@dataclass(frozen=True)
class Schemes:
    """All that a ``quantization_config`` says about weights.

    Attributes:
        dialect: ``compressed-tensors`` or ``gptq``; empty for 16-bit checkpoints.
        groups: in the config's order.
        ignore: names, patterns and classes that stay in 16 bit.
        dynamic: of the GPTQ dialect: pattern to changes, ``None`` for 16 bit.
        desc_act: of the GPTQ dialect: columns are quantized out of order.
    """

    dialect: str = ""
    groups: tuple[Group, ...] = ()
    ignore: tuple[str, ...] = ()
    dynamic: dict[str, Scheme | None] = field(default_factory=dict)
    desc_act: bool = False
