"""Read tensors of a checkpoint by name, whatever file they are in; write a directory as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moeq_plugin.files.atomic import staged

INDEX = "model.safetensors.index.json"


class WeightFiles:
    """The safetensors files of a checkpoint; only headers are read until a tensor is asked for.

    Args:
        directory: the checkpoint.

    Raises:
        ValueError: if it holds no safetensors file.
    """

    def __init__(self, directory: Path) -> None:
        self.files = sorted(directory.glob("*.safetensors"))
        if not self.files:
            raise ValueError(f"{directory} holds no *.safetensors file; expected a checkpoint")
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    self._file_of[name] = path
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return a tensor's shape, ``None`` if there is no such tensor."""
        return self._shapes.get(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        with safe_open(self._file_of[name], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
            return found

    def names_in(self, path: Path) -> list[str]:
        """Return the names of the tensors in one of the files."""
        return [name for name, file in self._file_of.items() if file == path]


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
        """Write one file of tensors."""
        save_file(tensors, self._directory / file_name, {"format": "pt"})
        self._file_of |= dict.fromkeys(tensors, file_name)
        self._num_bytes += sum(t.numel() * t.element_size() for t in tensors.values())

    def finish(self) -> None:
        """Write the index, if there is more than one file."""
        if len(set(self._file_of.values())) > 1:
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._file_of}
            write_json(self._directory / INDEX, index)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes ``path`` at the end, or vanishes on an error.

    Raises:
        ValueError: if ``path`` exists and is not an empty directory.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is not empty; nothing was written. Choose a new directory.")
    with staged(path) as unfinished:
        yield unfinished


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        ValueError: if it is not there or no JSON.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected a checkpoint directory")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object the way transformers writes ``config.json``."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
