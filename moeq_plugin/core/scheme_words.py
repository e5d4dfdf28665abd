"""A weight scheme in words: the same for who writes a checkpoint and for who reads it.

Standard library only, as :mod:`moeq_plugin.core.names`.
"""

from __future__ import annotations


def scheme_in_words(
    num_bits: int,
    group_size: int | None,
    *,
    symmetric: bool,
    is_float: bool = False,
    strategy: str = "group",
) -> str:
    """Return what people compare schemes by.

    Args:
        num_bits: of a code.
        group_size: input columns that share a scale; ``None``, or -1, for another strategy.
        symmetric: without zero points.
        is_float: codes are small floats, not integers.
        strategy: what shares a scale where it is not a group, such as ``channel``.

    Example:
        >>> scheme_in_words(4, 128, symmetric=True)
        'W4 symmetric group 128'
        >>> scheme_in_words(8, None, symmetric=True, is_float=True, strategy="channel")
        'W8 float symmetric channel'
    """
    kind = "float " if is_float else ""
    symmetry = "symmetric" if symmetric else "asymmetric"
    group = f"group {group_size}" if group_size and group_size > 0 else strategy
    return f"W{num_bits} {kind}{symmetry} {group}"
