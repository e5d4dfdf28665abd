"""Where a directory is put together before it has its place: beside it, under a lock."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moeq_plugin.files.atomic import PARTIAL, sync_tree
from moeq_plugin.files.lock import LOCK_FILE, held_directory


def is_stage(directory: Path) -> bool:
    """Tell whether a directory is one that :func:`staged` has yielded."""
    return directory.parent.name == _temporary(directory).name


def published_as(directory: Path) -> Path:
    """Return the directory that a stage becomes; any other directory as it is."""
    while is_stage(directory):
        directory = directory.parent.parent / directory.name
    return directory


@contextmanager
def temporary_stage(directory: Path, *, beside: Path) -> Iterator[Path]:
    """Yield an empty directory named as another, in a temporary one beside a path.

    Raises:
        ValueError: if the temporary one is in use, or somebody else's.
    """
    # on the same file system, so that all that is left to do at the end is to rename
    temporary = _temporary(beside)
    stage = temporary / directory.name
    if _is_of_others(temporary):
        raise ValueError(
            f"{temporary} is needed to write {directory} and holds files of something else; move "
            "it away, or delete it if it is left over"
        )
    with held_directory(temporary):
        shutil.rmtree(stage, ignore_errors=True)  # of a process that was killed: it held the lock
        try:
            stage.mkdir()
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    with suppress(OSError):  # it is gone, or holds something of others
        temporary.rmdir()  # a killed process had made it


def _is_of_others(temporary: Path) -> bool:
    """Tell whether a directory holds something, and nothing that says it is a stage's."""
    try:
        # in one look: whoever holds it may end at any moment
        names = {path.name for path in temporary.iterdir()}
    except FileNotFoundError:
        return False
    return bool(names) and LOCK_FILE not in names


def _temporary(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}{PARTIAL}")


def finish(stage: Path) -> None:
    """Give files the mode that the user's mask gives, and bring all of it to the disk."""
    mode = stage.stat().st_mode & 0o666  # safetensors makes files that only their owner can read
    for path in stage.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
    sync_tree(stage)
