"""What a run has finished, part by part: numbered files of tensors, each with a digest.

A file appears whole or not at all, so that it is sound after a kill, a full disk or a power
failure. Its digest is of the run too: what somebody or the disk has changed since, and the part of
another run or place, is refused and not built upon.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moeq_plugin.files.atomic import write_whole
from moeq_plugin.files.work_dir import part_name


class KeptParts:
    """Files of one kind in the directory of a run, in the order in which they were kept.

    Args:
        directory: of the run.
        kind: the beginning of their names.
        run: returns a digest of what the run is, which is known by the time a part is kept or read.
    """

    def __init__(self, directory: Path, kind: str, run: Callable[[], str]) -> None:
        self._directory, self._kind, self._run = directory, kind, run

    def keep(self, about: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one more part.

        Args:
            about: what is said of the tensors; values that JSON holds.
            tensors: by name, at least one.

        Raises:
            OSError: if it cannot be written; nothing kept before is lost.
        """
        number = len(self._paths())
        said, path = json.dumps(about), self._path(number)
        on_cpu = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
        metadata = {"about": said, "digest": self._digest(number, said, on_cpu)}
        try:
            write_whole(path, lambda new: save_file(on_cpu, new, metadata=metadata))
        except Exception as error:
            raise OSError(
                f"cannot keep the state of {len(tensors)} tensors in {path}: {error}. What was "
                "kept before is sound: make room or give access, and run the same again"
            ) from error

    def __iter__(self) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
        """Yield what is said of each part, and its tensors.

        Raises:
            ValueError: if a file is not what was kept.
        """
        paths = self._paths()
        missing = [path for number, path in enumerate(paths) if path != self._path(number)]
        if missing:
            gone = self._path(paths.index(missing[0]))
            raise ValueError(
                f"{gone} is not there any more; delete {self._directory} to start anew"
            )
        for number in range(len(paths)):
            yield self.part(number)

    def part(self, number: int) -> tuple[Any, dict[str, torch.Tensor]]:
        """Return what is said of a part, and its tensors.

        Raises:
            ValueError: if its file is not what was kept.
        """
        try:
            return self._read(number)
        except Exception as error:  # it was whole when it appeared: somebody changed it since
            raise ValueError(
                f"{self._path(number)} was changed after it had been kept ({error}); delete "
                f"{self._directory} to start anew"
            ) from error

    def _read(self, number: int) -> tuple[Any, dict[str, torch.Tensor]]:
        with safe_open(self._path(number), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
        said = metadata["about"]
        if metadata.get("digest") != self._digest(number, said, tensors):
            raise ValueError("its digest does not fit")
        return json.loads(said), tensors

    def _digest(self, number: int, said: str, tensors: Mapping[str, torch.Tensor]) -> str:
        place = f"{self._kind} {number} {self._run()}"
        lines = [f"{name} {tensor_digest(tensors[name])}" for name in sorted(tensors)]
        return hashlib.sha256("\n".join([place, said, *lines]).encode()).hexdigest()

    def _path(self, number: int) -> Path:
        return self._directory / part_name(self._kind, number)

    def _paths(self) -> list[Path]:
        return sorted(self._directory.glob(f"{self._kind}-*.safetensors"))


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return a digest of a tensor: shape, type and all bytes."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    flat = tensor.detach().flatten().contiguous().cpu()
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
