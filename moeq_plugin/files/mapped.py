"""A mapped file that is read from one end to the other, again and again, within bounds.

Pages of a mapped file count as memory of the process from when they are read until the system needs
them for others. Here they are let go of as they pile up, and what is changed meanwhile is noticed:
a page that was let go of is read from the file once more.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

_SECONDS_BETWEEN_LOOKS = 0.05
# more than what is read again and again before the next part: a layer, or the head
_LEAST_KEPT = 1 << 29
_SHARE_KEPT = 8
_PAGE_OUT = 21  # MADV_PAGEOUT; pages that were written to stay, or go to swap
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (?:\S+ +){4}(.*)")


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Read a file that has to stay as it is.

    One that takes its place under the same name does no harm: what was opened stays.

    Raises:
        ValueError: in the end, if the file has been written to.
    """
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        yield
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(
            f"{path} was written to while it was read, so that some weights may be of the old file "
            "and some of the new one: start again from a file that stays as it is"
        )


@contextmanager
def letting_go(path: Path, is_wanted: Callable[[], bool]) -> Iterator[None]:
    """Let go of a mapped file's pages as they pile up to an eighth of it, or half a gigabyte.

    Linux only, and only of files that this user owns or may write to; elsewhere nothing is done.

    Args:
        path: of the file, whoever maps it.
        is_wanted: asked each time; not while all of the file is read for every token, say.
    """
    if sys.platform != "linux":
        yield
        return
    is_over = Event()
    most = max(_LEAST_KEPT, path.stat().st_size // _SHARE_KEPT)

    def watch() -> None:
        before = _resident_of_files()
        while not is_over.wait(_SECONDS_BETWEEN_LOOKS):
            if is_wanted() and _resident_of_files() > before + most:
                let_go(path)
                before = _resident_of_files()

    thread = Thread(target=watch, name=f"letting go of {path.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def let_go(path: Path) -> None:
    """Let go of the pages of a file that this process maps, of all that it has not written to."""
    # nothing is lost if a mapping is gone by now: pages are only moved out, to be found again
    advise = ctypes.CDLL(None).madvise
    for start, end in _mappings(path):
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _PAGE_OUT)


def _mappings(path: Path) -> list[tuple[int, int]]:
    """Return the addresses at which this process maps a file, first and behind the last."""
    wanted = str(path.resolve())
    lines = Path("/proc/self/maps").read_text().splitlines()
    found = [match for line in lines if (match := _MAPPING.fullmatch(line))]
    return [(int(of[1], 16), int(of[2], 16)) for of in found if of[3] == wanted]


def _resident_of_files() -> int:
    """Return the bytes of files that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * resource.getpagesize()
