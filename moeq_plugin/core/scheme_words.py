"""A weight scheme in words: the same for who writes a checkpoint and for who reads it.

Standard library only, as :mod:`moeq_plugin.core.names`.
"""

from __future__ import annotations

import re

_CODEBOOK = re.compile(r"CB(\d{1,2})D(\d)_G(\d{1,7})x(\d{1,7})")


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


def codebook_in_words(index_bits: int, vector_dim: int, group_rows: int, group_columns: int) -> str:
    """Return a codebook format as people compare it with others.

    Args:
        index_bits: of an index.
        vector_dim: neighbouring columns that share one.
        group_rows: rows that share a codebook.
        group_columns: columns that share it.

    Example:
        >>> codebook_in_words(6, 2, 64, 32)
        'codebook 6 bit per 2, 64 x 32'
    """
    return f"codebook {index_bits} bit per {vector_dim}, {group_rows} x {group_columns}"


def codebook_named(name: str) -> tuple[int, ...] | None:
    """Return what the name of a codebook says, as :func:`codebook_in_words` takes it, or ``None``.

    Example:
        >>> codebook_named("CB6D2_G64x32")
        (6, 2, 64, 32)
    """
    found = _CODEBOOK.fullmatch(name)
    return tuple(map(int, found.groups())) if found else None
