"""What a file system says of a path: what is there of it, and what may be done there."""

from __future__ import annotations

import os
import re
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")  # knows also mounts of a directory within its file system


def existing_part(path: Path) -> Path:
    """Return a path, or the deepest of the directories above it that is there."""
    return next(above for above in (path, *path.parents) if above.exists())


def is_writable(path: Path) -> bool:
    """Tell whether a path is a directory in which files may be made."""
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def is_mount_point(directory: Path) -> bool:
    """Tell whether something is mounted at a directory, from the same file system or another."""
    if os.path.ismount(directory):
        return True
    if not _MOUNTS.exists():
        return False
    places = (line.split()[4] for line in _MOUNTS.read_text(errors="replace").splitlines())
    return str(directory.resolve()) in {_unescaped(place) for place in places}


def _unescaped(place: str) -> str:
    """Return a path of the list of mounts, where spaces and the like are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place)
