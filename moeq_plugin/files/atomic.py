"""Files that appear complete or not at all, and are on the disk once they have appeared."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

PARTIAL = ".partial"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file that appears at ``path`` only once it is on the disk.

    Args:
        path: of the file; a link leads to what is written. A pipe or a device, which has no whole,
            is written as it is.
        write: called with the path to write instead.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        write(path)
        return
    # a name that nobody else has: what lies there is never overwritten
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    with partial.open("x") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    try:
        write(partial)
        partial.chmod(mode)  # safetensors makes files that only their owner can read
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears complete or not at all."""
    write_whole(path, lambda new: new.write_text(text, encoding="utf-8"))


def remove_partial(path: Path) -> None:
    """Remove what :func:`write_whole` has left beside a path when it was killed.

    Args:
        path: which no process is writing.
    """
    for beside in path.parent.iterdir():
        if is_partial(beside.name, of=re.escape(path.name)):
            beside.unlink()


def is_partial(name: str, of: str) -> bool:
    """Tell whether a file name is one that :func:`write_whole` makes on its way.

    Args:
        name: of the file that was found.
        of: regular expression for the names of the files that it would have become.
    """
    return re.fullmatch(rf"\.(?:{of})\.\d+-[0-9a-f]{{8}}{re.escape(PARTIAL)}", name) is not None


def sync(path: Path) -> None:
    """Wait until a file, or what a directory lists, is on the disk.

    Raises:
        OSError: if it cannot be brought there.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # no need to on such file systems
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Wait until a directory with all that is in it is on the disk."""
    for path in sorted(directory.rglob("*")):
        if not path.is_symlink():
            sync(path)
    sync(directory)
