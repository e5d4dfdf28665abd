"""Schemes by the names that the host gives them, without loading the host."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from moeq_plugin.checkpoint.codebooks import Codebooks
from moeq_plugin.checkpoint.schemes import Scheme
from moeq_plugin.core.scheme_words import codebook_named

_NAME = re.compile(r"(?:W([2-8])A16|(W4A16_ASYM)|(W8A8|INT8))(?:_G(\d{1,5}))?")
_GROUP_SIZE = 128
# of compressed-tensors, whose import takes seconds
HOST_NAMES = frozenset({
    "FP8", "FP8_BLOCK", "FP8_DYNAMIC", "INT8", "MXFP4", "MXFP4A16", "MXFP8", "MXFP8A16", "NVFP4",
    "NVFP4A16", "UNQUANTIZED", "W2A16", "W2A4", "W2A8", "W3A16", "W3A4", "W3A8", "W4A16",
    "W4A16_ASYM", "W4A4", "W4A8", "W4AFP8", "W5A16", "W5A8", "W6A16", "W6A8", "W7A16", "W7A8",
    "W8A16", "W8A8",
})  # fmt: skip


def check_name(name: str) -> None:
    """Refuse a name that the host does not know, with ``_G64`` or the like after it or without.

    Raises:
        ValueError: saying which names are near.

    Example:
        >>> check_name("W4A16"), check_name("W3A16_G64")
        (None, None)
    """
    base = re.sub(r"_G\d+$", "", name).upper()
    if base in HOST_NAMES or codebook_named(name):
        return
    near = [f"W{bits}A16" for bits in re.findall(r"[2-8]", base)[:1]]
    near += difflib.get_close_matches(base, sorted(HOST_NAMES), n=2)
    near = list(dict.fromkeys(near)) or ["W4A16", "W8A16"]
    raise ValueError(f"{ascii(name)} is not a scheme; did you mean {' or '.join(near)}?")


def served_by(names: Iterable[str]) -> str:
    """Return what serves these schemes, where ordinary kernels do not; empty where they do."""
    schemes = {name: scheme_named(name) for name in names if _NAME.fullmatch(name)}
    rare = [name for name, of in schemes.items() if isinstance(of, Scheme) and of.needs_humming]
    if not rare:
        return ""
    return (
        f"{', '.join(rare)}: vLLM serves this only with its Humming kernels, on an NVIDIA GPU of "
        "compute capability 7.5 or more; transformers reads it anywhere (docs/serving.md)"
    )


def scheme_named(name: str) -> Scheme | Codebooks:
    """Return the scheme of a name such as ``W4A16``, ``W4A16_ASYM``, ``W8A8`` or ``W3A16_G64``.

    ``CB6D2_G64x32`` are codebooks: 6 bits for 2 columns, 64 rows times 32 columns share one.

    Raises:
        ValueError: for other names.

    Example:
        >>> scheme_named("W3A16_G64").describe()
        'W3 symmetric group 64'
    """
    if fields := codebook_named(name):
        return Codebooks.of(*fields)
    found = _NAME.fullmatch(name)
    group_size = int(found[4]) if found and found[4] else None
    if found is None or group_size == 0:
        raise ValueError(
            f"{ascii(name)} is not a scheme that can be planned for: W2A16 to W8A16, W4A16_ASYM or "
            "W8A8, with _G64 or the like for another group size, or codebooks such as CB6D2_G64x32"
        )
    if found[3]:
        strategy = "group" if group_size else "channel"
        return Scheme("int-quantized", 8, group_size, strategy=strategy, has_activations=True)
    num_bits = 4 if found[2] else int(found[1])
    return Scheme("pack-quantized", num_bits, group_size or _GROUP_SIZE, symmetric=not found[2])
