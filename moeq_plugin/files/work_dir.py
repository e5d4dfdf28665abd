"""What belongs to the state of a run in its work directory, and what is somebody else's."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from moeq_plugin.files.atomic import is_partial
from moeq_plugin.files.lock import LOCK_FILE, InUseError, held_directory

RUN_FILE = "run.json"
TEXT_FILE = "ebss.jsonl"  # a calibration set that the model has written
TABLE_FILE = "moeq_sensitivity.json"
LAYERS, MEASURED, GRADIENTS = "layer", "measured", "gradients"  # kinds of parts
_TABLE = rf"{re.escape(TABLE_FILE)}(\.sha256)?"  # and its digest
_PARTS = rf"({LAYERS}|{MEASURED}|{GRADIENTS})-\d{{5}}\.safetensors"
_KEPT = rf"{_PARTS}|{_TABLE}|ebss\.jsonl|ebss\.manifest\.json"
_OURS = rf"{_KEPT}|{re.escape(RUN_FILE)}"
_LOCKS = {LOCK_FILE, f".{TEXT_FILE}.lock"}


def part_name(kind: str, number: int) -> str:
    """Return the name of a file with what a run has finished at once."""
    return f"{kind}-{number:05d}.safetensors"


def holds_progress(directory: Path) -> bool:
    """Tell whether a run has finished anything there."""
    return any(re.fullmatch(_KEPT, name) for name in _names(directory))


def holds_state(directory: Path) -> bool:
    """Tell whether a run has begun there, or more."""
    return (directory / RUN_FILE).exists() or holds_progress(directory)


def may_go(directory: Path) -> bool:
    """Tell whether a directory is one that a run makes or has made, so that it removes it again."""
    return not directory.exists() or holds_state(directory)


def foreign_files(directory: Path) -> list[str]:
    """Return the names of what no run has put there."""
    return [name for name in _names(directory) if not _is_ours(name)]


def remove_partial(directory: Path) -> None:
    """Remove what a run was writing when it was killed; the directory is held."""
    for name in _names(directory):
        if is_partial(name, of=_OURS):
            (directory / name).unlink()


def remove_state(directory: Path, *, with_directory: bool) -> None:
    """Remove what runs have put there, unless another process has begun to work there.

    Args:
        directory: need not exist.
        with_directory: whether it goes too, if nothing else is in it.
    """
    if not directory.is_dir():
        return
    with suppress(InUseError, OSError):  # what is left over does no harm
        with held_directory(directory):
            for name in _names(directory):
                if _is_ours(name) and name != LOCK_FILE:
                    (directory / name).unlink()
        if with_directory:
            directory.rmdir()


def check_work_dir(directory: Path) -> None:
    """Refuse a directory with files of something else and no state.

    Raises:
        ValueError: naming one of them.
    """
    foreign = foreign_files(directory)
    if foreign and not (directory / RUN_FILE).exists():
        raise ValueError(
            f"work_dir {directory} holds files of something else ({min(foreign)}, "
            f"{len(foreign)} in all); choose a new or an empty directory"
        )


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []


def _is_ours(name: str) -> bool:
    is_kept = re.fullmatch(_OURS, name) is not None
    return is_kept or name in _LOCKS or is_partial(name, of=_OURS)
