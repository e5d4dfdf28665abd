"""Files and directories that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
_OF_A_CHECKPOINT = ("*.safetensors", "*.safetensors.index.json")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file that appears at ``path`` only once it is on the disk.

    Args:
        path: of the file.
        write: called with the path to write instead.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Yield an empty directory of the same name whose files go to ``directory`` at the end.

    After an exception ``directory`` is as it was. A directory that holds files keeps those that
    the new ones do not replace, but for weights, which would be mistaken for the new ones.

    Args:
        directory: need not exist.
    """
    directory = directory.absolute()
    # Beside the directory, so that moving files there is a rename within one file system.
    temporary = directory.with_name(f".{directory.name}{PARTIAL}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    stage = temporary / directory.name
    stage.mkdir(parents=True)
    try:
        yield stage
        _publish(stage, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(stage: Path, directory: Path) -> None:
    if not directory.exists() or not any(directory.iterdir()):
        stage.replace(directory)
        return
    new = [path.relative_to(stage) for path in stage.rglob("*") if path.is_file()]
    stale = {path for pattern in _OF_A_CHECKPOINT for path in directory.glob(pattern)}
    for path in new:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (stage / path).replace(directory / path)
    for path in stale - {directory / path for path in new}:
        path.unlink()
