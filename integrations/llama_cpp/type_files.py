"""What an allocation chose, as ``llama-quantize --tensor-type-file`` reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from moeq_plugin.integrations.llama_cpp.tensor_types import EMBEDDINGS, embedding_type
from moeq_plugin.untrusted.reading import MAX_CONFIG_BYTES, read_text


def chosen_types(choice: Mapping[str, str], tensors: Mapping[str, str]) -> dict[str, str]:
    """Return the type of each tensor.

    Args:
        choice: module name to type, as in an allocation for the target ``gguf``.
        tensors: module name to llama.cpp's name of the tensor.

    Raises:
        ValueError: if experts of one tensor were given different types.
    """
    found: dict[str, str] = {}
    for module, name in choice.items():
        if found.setdefault(tensors[module], name) != name:
            raise ValueError(
                f"llama.cpp holds all experts of {tensors[module]} in one type, and the allocation "
                f"has {found[tensors[module]]} and {name}: allocate for the target gguf"
            )
    return found


def with_embeddings(types: Mapping[str, str], columns: int) -> dict[str, str]:
    """Return the types of all tensors that ``llama-quantize`` would otherwise decide about."""
    return {**types, **dict.fromkeys(EMBEDDINGS, embedding_type(columns))}


def write_types(path: Path, types: Mapping[str, str]) -> None:
    """Write what ``llama-quantize --tensor-type-file`` reads: a pattern and a type in a line."""
    lines = [f"^{re.escape(name)}$={type_name.lower()}" for name, type_name in types.items()]
    path.write_text("\n".join(lines) + "\n")


def read_types(path: Path) -> dict[str, str]:
    """Read what :func:`write_types` wrote.

    Raises:
        ValueError: if a line is something else.
    """
    found = {}
    for line in read_text(path, MAX_CONFIG_BYTES).split():
        parts = re.fullmatch(r"\^(\S+)\$=(\w+)", line)
        if parts is None:
            raise ValueError(f"{path}: expected ^NAME$=TYPE, got {line!r}")
        found[parts[1].replace("\\", "")] = parts[2].upper()
    return found
