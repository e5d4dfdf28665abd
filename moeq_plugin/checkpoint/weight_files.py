"""Which files of a directory hold the weights: one rule for everything that reads a checkpoint.

With an index it is the files that the index names, without one ``model.safetensors``, and where
there is neither, every safetensors file, as vLLM reads them. transformers and vLLM agree on that as
long as nothing else lies beside these files; what does is told by :func:`unread_files`.
"""

from __future__ import annotations

from pathlib import Path

from moeq_plugin.checkpoint.headers import shards_of
from moeq_plugin.untrusted.broken import UnreadableFileError
from moeq_plugin.untrusted.reading import MAX_LIST_BYTES, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold the weights, sorted by name; empty if there are none.

    Raises:
        UnreadableFileError: if the index is not one, or names a file that is not there.
    """
    index, single = directory / INDEX, directory / SINGLE
    if index.exists():
        files = [directory / file for file in sorted(set(index_of(directory).values()))]
        for path in files:
            if not path.is_file():
                raise UnreadableFileError(f"{path.name} is not there, but {INDEX} names it")
        return files
    return [single] if single.exists() else sorted(directory.glob("*.safetensors"))


def index_of(directory: Path) -> dict[str, str]:
    """Return the file of each tensor, as the index says.

    Raises:
        UnreadableFileError: if there is no index, or it is not one.
    """
    path = directory / INDEX
    return shards_of(read_json(path, MAX_LIST_BYTES), path)


def unread_files(directory: Path) -> list[Path]:
    """Return the safetensors files that are not among :func:`weight_files`.

    Raises:
        UnreadableFileError: if the index is not one.
    """
    if (directory / INDEX).exists():
        read = set(index_of(directory).values())
    else:
        read = {path.name for path in weight_files(directory)}
    return [path for path in sorted(directory.glob("*.safetensors")) if path.name not in read]
