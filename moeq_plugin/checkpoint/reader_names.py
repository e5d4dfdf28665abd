"""How files and vLLM call what is canonically called as :mod:`moeq_plugin.core.names` says."""

from __future__ import annotations

import re

from moeq_plugin.core.names import FUSED, mixtral

_FUSED_INTO = {part: whole for whole, parts in FUSED.items() for part in parts}
# the suffixes of the tensors of one linear; a module's other tensors keep their name
_SUFFIXES = re.compile(
    r"(.+)\.(weight|bias|weight_packed|weight_scale|weight_zero_point|weight_shape|weight_g_idx|"
    r"weight_global_scale|input_scale|input_zero_point|input_global_scale|qweight|qzeros|scales|"
    r"g_idx)"
)


def split_tensor(name: str) -> tuple[str, str]:
    """Return a tensor's module and suffix; the suffix is empty for what is no linear's."""
    found = _SUFFIXES.fullmatch(name)
    return (found[1], found[2]) if found else (name, "")


def in_file(name: str, family: str) -> str:
    """Return the name that ``save_pretrained`` gives to what is canonically called ``name``."""
    return mixtral(name) if family == "mixtral" else name


def in_vllm(name: str, family: str) -> str:
    """Return vLLM's name of an unfused module."""
    if family == "gpt_oss":
        return name.replace(".self_attn.", ".attn.")
    return in_file(name, family)


def fused_name(name: str) -> str | None:
    """Return what vLLM calls the matrix that a module becomes a part of, ``None`` for none.

    The experts of a layer are not asked for: vLLM holds them in two tensors of its own.
    """
    parent, dot, projection = name.rpartition(".")
    whole = _FUSED_INTO.get(projection)
    return f"{parent}{dot}{whole}" if whole and ".experts." not in name else None


def fused_parts(whole: str) -> list[str]:
    """Return the modules that vLLM fuses into a matrix; the inverse of :func:`fused_name`."""
    parent, dot, matrix = whole.rpartition(".")
    return [f"{parent}{dot}{part}" for part in FUSED[matrix]]
