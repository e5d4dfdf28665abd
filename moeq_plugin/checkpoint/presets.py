"""Schemes by the names that the host gives them, without loading the host."""

from __future__ import annotations

import re

from moeq_plugin.checkpoint.schemes import Scheme

_NAME = re.compile(r"(?:W([2-8])A16|(W4A16_ASYM)|(W8A8|INT8))(?:_G(\d{1,5}))?")
_GROUP_SIZE = 128


def scheme_named(name: str) -> Scheme:
    """Return the scheme of a name such as ``W4A16``, ``W4A16_ASYM``, ``W8A8`` or ``W3A16_G64``.

    Raises:
        ValueError: for other names.

    Example:
        >>> scheme_named("W3A16_G64").describe()
        'W3 symmetric group 64'
    """
    found = _NAME.fullmatch(name)
    group_size = int(found[4]) if found and found[4] else None
    if found is None or group_size == 0:
        raise ValueError(
            f"{ascii(name)} is not a scheme that can be planned for: W2A16 to W8A16, W4A16_ASYM or "
            "W8A8, with _G64 or the like for another group size"
        )
    if found[3]:
        strategy = "group" if group_size else "channel"
        return Scheme("int-quantized", 8, group_size, strategy=strategy, has_activations=True)
    num_bits = 4 if found[2] else int(found[1])
    return Scheme("pack-quantized", num_bits, group_size or _GROUP_SIZE, symmetric=not found[2])
