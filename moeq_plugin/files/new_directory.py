"""Directories that can appear as a whole by a rename, and those that cannot."""

from __future__ import annotations

from pathlib import Path

from moeq_plugin.files.disk import existing_part, is_mount_point, is_writable


def check_new_directory(directory: Path) -> None:
    """Refuse a directory that cannot appear as a whole by a rename.

    Raises:
        ValueError: if it holds something, is no directory, may not be written, or is one that
            cannot be replaced.
    """
    directory = directory.resolve()
    if directory.is_dir() and any(directory.iterdir()):
        raise ValueError(
            f"output_dir {directory} is not empty; nothing was written. Choose a new directory, "
            "or empty this one if nothing in it is needed."
        )
    if directory.is_dir() and is_mount_point(directory):
        raise ValueError(
            f"output_dir {directory} is a mount point, so that nothing can be renamed to it; "
            f"nothing was written. Choose a directory in it, such as {directory / 'checkpoint'}."
        )
    if directory.is_dir() and Path.cwd() == directory:
        raise ValueError(
            f"output_dir {directory} is the current directory, which cannot be replaced under you; "
            "nothing was written. Choose a directory in it."
        )
    # it is made beside its place first
    existing = existing_part(directory.parent if directory.is_dir() else directory)
    if not is_writable(existing):
        raise ValueError(
            f"output_dir {directory} cannot be written ({existing} is not a writable directory); "
            "nothing was calibrated yet."
        )


def replaceable(directory: Path) -> bool:
    """Tell whether :func:`check_new_directory` has nothing against a directory."""
    try:
        check_new_directory(directory)
    except ValueError:
        return False
    return True
