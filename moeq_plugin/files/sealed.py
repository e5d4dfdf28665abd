"""A file whose later changes are noticed: its digest stands beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from moeq_plugin.files.atomic import write_text, write_whole

_SUFFIX = ".sha256"


class SealedFile:
    """A file that was written whole, and its digest.

    Args:
        path: of the file; the digest is in a file of that name and ``.sha256``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seal = path.with_name(path.name + _SUFFIX)

    def write(self, write: Callable[[Path], object]) -> None:
        """Let ``write`` make the file; it appears after its digest, so never without it.

        Args:
            write: called with the path to write instead.
        """

        def sealed(new: Path) -> None:
            write(new)
            digest = _digest(new)
            write_text(self._seal, digest)

        write_whole(self.path, sealed)

    def is_there(self) -> bool:
        """Tell whether the file has been written.

        Raises:
            ValueError: if it was changed since.
        """
        if not self.path.exists():
            return False
        if not self._seal.exists() or self._seal.read_bytes() != _digest(self.path).encode():
            raise ValueError(
                f"{self.path} was changed after it had been written: its digest is not the one in "
                f"{self._seal.name}; delete both to have it made again"
            )
        return True


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
