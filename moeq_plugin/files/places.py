"""The places that a command reads and writes, checked before anything is computed for them.

A link is what it leads to. What is written never meets what is read or written beside it, so that
nothing is deleted or replaced that the command did not make; see :func:`check_places`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path

from moeq_plugin.files.disk import existing_part, is_writable


def check_places(*, reads: Mapping[str, Path | None], makes: Mapping[str, Path | None]) -> None:
    """Refuse places of one command that are each other's, or in each other.

    A new directory or file may lie within a directory that is read, as in ``moeq quantize . new``;
    nothing else may.

    Args:
        reads: files and directories by the name that the user knows; ``None`` where not given.
        makes: files and directories that are made, and removed again, likewise.

    Raises:
        ValueError: naming both.
    """
    read, made = _given(reads), _given(makes)
    for (name, path), (other, other_path) in combinations(made, 2):
        if _is_in(path, other_path) or _is_in(other_path, path):
            raise ValueError(
                f"{name} {path} and {other} {other_path} must be apart: one would be lost with "
                "the other; nothing was done"
            )
    for name, path in made:
        for other, other_path in read:
            if _is_in(other_path, path):
                raise ValueError(
                    f"{name} {path} would replace or remove {other} {other_path}, which is read; "
                    "choose another place; nothing was done"
                )


def check_new_file(
    name: str,
    path: Path | None,
    is_earlier: Callable[[Path], object],
    *,
    makes_parents: bool = False,
) -> None:
    """Refuse a file that cannot be written, or that would replace something of another kind.

    Args:
        name: that the user knows.
        path: of the file, ``None`` where not given.
        is_earlier: returns a false value, or raises ValueError, for a file that is no earlier
            result of the same kind.
        makes_parents: whether directories that it lies in are made as well.

    Raises:
        ValueError: saying why.
    """
    if path is None or (path.exists() and not path.is_file() and not path.is_dir()):
        return  # a pipe or a device
    path = path.resolve()
    if path.is_dir():
        raise ValueError(f"{name} {path} is a directory; expected the name of a file")
    parent = existing_part(path.parent) if makes_parents else path.parent
    if not is_writable(parent):
        raise ValueError(
            f"{name} {path} cannot be written: {parent} is not a directory that may be written"
        )
    if path.exists() and not _passes(is_earlier, path):
        raise ValueError(
            f"{name} {path} is there and is not an earlier result of this command; it was left "
            "as it is. Choose another name, or move it away."
        )


def _given(paths: Mapping[str, Path | None]) -> list[tuple[str, Path]]:
    try:
        return [(name, path.resolve()) for name, path in paths.items() if path is not None]
    except RuntimeError as error:  # links that lead to each other
        raise ValueError(f"a path leads nowhere: {error}") from error


def _is_in(path: Path, directory: Path) -> bool:
    """Tell whether a path is a directory or in it, under whatever names."""
    return any(_is_same(above, directory) for above in (path, *path.parents))


def _is_same(path: Path, other: Path) -> bool:
    if path == other:
        return True
    try:
        return path.samefile(other)
    except OSError:
        return False


def _passes(check: Callable[[Path], object], path: Path) -> bool:
    try:
        return bool(check(path))
    except (ValueError, OSError):
        return False
