"""Read tensors of a checkpoint by name, whatever file they are in; write a directory as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moeq_plugin.checkpoint.headers import StoredTensor, read_header
from moeq_plugin.checkpoint.weight_files import INDEX, weight_files


class WeightFiles:
    """The safetensors files of a checkpoint; only headers are read until a tensor is asked for.

    Args:
        directory: the checkpoint.

    Raises:
        ValueError: if it holds no safetensors file.
    """

    def __init__(self, directory: Path) -> None:
        self.files = weight_files(directory)
        if not self.files:
            raise ValueError(f"{directory} holds no *.safetensors file; expected a checkpoint")
        stored = [tensor for path in self.files for tensor in sorted(read_header(path), key=_name)]
        self._stored = {tensor.name: tensor for tensor in stored}

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return a tensor's shape, ``None`` if there is no such tensor."""
        return self._stored[name].shape if name in self._stored else None

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        with safe_open(self._stored[name].path, framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
            return found

    def names_in(self, path: Path) -> list[str]:
        """Return the names of the tensors in one of the files."""
        return [name for name, tensor in self._stored.items() if tensor.path == path]


def _name(tensor: StoredTensor) -> str:
    return tensor.name


class ShardWriter:
    """Writes one file after another, and the index once there are several.

    Args:
        directory: where to.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file_of: dict[str, str] = {}
        self._num_bytes = 0

    def write(self, file_name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Write one file of tensors.

        Raises:
            OSError: if the disk is full or the like.
        """
        try:
            save_file(tensors, self._directory / file_name, {"format": "pt"})
        except SafetensorError as error:  # which is no OSError there
            raise OSError(f"{self._directory / file_name} cannot be written: {error}") from error
        self._file_of |= dict.fromkeys(tensors, file_name)
        self._num_bytes += sum(t.numel() * t.element_size() for t in tensors.values())

    def finish(self) -> None:
        """Write the index, if there is more than one file."""
        if len(set(self._file_of.values())) > 1:
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._file_of}
            write_json(self._directory / INDEX, index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object the way transformers writes ``config.json``."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
