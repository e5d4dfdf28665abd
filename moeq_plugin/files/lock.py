"""Places that one process has for itself, for as long as it lives and no longer."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK_FILE = ".moeq.lock"  # in a directory of ours; who finds it in one knows whose it is
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class InUseError(ValueError):
    """Another process works in a place, so nothing was done there."""


@contextmanager
def locked(file: Path, place: Path) -> Iterator[None]:
    """Hold a lock; the system takes it from a process that dies, so that none is left behind.

    Args:
        file: what is locked. Made with its directory if it is not there, gone at the end.
        place: what it stands for, for the message.

    Raises:
        InUseError: if another holder is alive.
    """
    descriptor = _open_locked(file, place)
    try:
        yield
    finally:
        # before it is let go: whoever has opened it meanwhile sees that it is no longer the one
        file.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def held_directory(directory: Path) -> Iterator[None]:
    """Hold a directory; made if it is not there, and removed at the end if it is empty then.

    Args:
        directory: where nobody else who asks likewise may work.

    Raises:
        InUseError: if another holder is alive.
    """
    is_new = not directory.exists()
    try:
        with locked(directory / LOCK_FILE, directory):
            yield
    finally:
        if is_new:
            with suppress(OSError):  # it holds something, or is gone
                directory.rmdir()


def _open_locked(file: Path, place: Path) -> int:
    """Return the descriptor of the locked file.

    Raises:
        InUseError: if it is locked, or if the file system knows no locks and the file is there.
        OSError: if it cannot be opened.
    """
    in_use = f"{place} is in use by another process; wait for it, or choose another place"
    while True:
        existed = file.exists()
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue  # a holder has just ended and removed the directory
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise InUseError(in_use) from error
        except OSError as error:
            if error.errno in _UNSUPPORTED and not existed:
                return descriptor  # the file alone has to say it
            os.close(descriptor)
            if error.errno not in _UNSUPPORTED:
                raise
            raise InUseError(f"{in_use}. If none is running, delete {file}") from error
        if _is_still(file, descriptor):
            return descriptor
        os.close(descriptor)  # its holder has just ended and removed it: there is a new one to open


def _is_still(file: Path, descriptor: int) -> bool:
    """Tell whether a file that was opened has kept its name."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
