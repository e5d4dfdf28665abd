"""Directories that appear complete or not at all; what was there before is never touched."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeq_plugin.files.atomic import sync
from moeq_plugin.files.new_directory import check_new_directory, replaceable
from moeq_plugin.files.stage import finish, temporary_stage

_LAST = "config.json"  # what makes a directory a checkpoint for whoever reads it


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Yield an empty directory of the same name that becomes ``directory`` by one rename.

    After an exception ``directory`` is as it was. Until the end no other process may stage it.

    Args:
        directory: is not there, or empty; a link leads to the directory that is meant.

    Raises:
        ValueError: if it holds files, cannot be replaced or is being staged by another process.
        OSError: if it was filled meanwhile; what was made is kept beside it then.
    """
    directory = directory.resolve()
    check_new_directory(directory)
    with temporary_stage(directory, beside=directory) as stage:
        check_new_directory(directory)  # once more: whoever held it before may have filled it
        yield stage
        finish(stage)
        if directory.is_dir():
            stage.chmod(directory.stat().st_mode & 0o7777)  # as its owner has made it
        try:
            stage.rename(directory)  # over an empty directory, never over one that holds something
        except OSError as error:
            _keep(stage, directory, error)
        sync(directory.parent)


@contextmanager
def joined(directory: Path) -> Iterator[Path]:
    """Like :func:`staged`, but beside files that ``directory`` holds or where it must stay itself.

    Files move in one by one, the configuration last. None of those that are there is replaced.

    Args:
        directory: anything that :func:`staged` takes, or a directory without a checkpoint.

    Raises:
        ValueError: as :func:`staged`.
        OSError: if the directory holds files that would be replaced; what was made is kept beside
            it then.
    """
    directory = directory.resolve()
    if replaceable(directory):
        with staged(directory) as stage:
            yield stage
        return
    with temporary_stage(directory, beside=directory / "checkpoint") as stage:
        yield stage
        finish(stage)
        if taken := _taken(stage, directory):
            _keep(stage, directory, FileExistsError(f"it holds {', '.join(taken)}"))
        for path in sorted(stage.iterdir(), key=lambda path: path.name == _LAST):
            path.rename(directory / path.name)
        sync(directory)


def _taken(stage: Path, directory: Path) -> list[str]:
    """Return names in a directory that a checkpoint would replace, or be mistaken for."""
    new = {path.name for path in stage.iterdir()}
    there = {path.name for path in directory.iterdir()}
    weights = {name for name in there if name.endswith((".safetensors", ".safetensors.index.json"))}
    return sorted(new & there | weights)


def _keep(stage: Path, directory: Path, reason: OSError) -> None:
    """Move a finished directory to a name that is free, and say so.

    Raises:
        OSError: always.
    """
    names = (f"{directory.name}-{number}" for number in itertools.count(2))
    free = next(path for name in names if not os.path.lexists(path := stage.parent.parent / name))
    stage.rename(free)
    sync(free.parent)
    raise OSError(
        f"{directory} cannot take the checkpoint ({reason.strerror or reason}) and was left as it "
        f"is; the checkpoint is complete in {free}"
    ) from reason
