"""One rank makes a directory for all, and gives it its place once all have written to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

from compressed_tensors.distributed import get_source_rank, is_distributed, is_source_process
from torch import distributed

_PATIENCE = timedelta(hours=3)  # bringing a large checkpoint to the disk takes more than minutes


@contextmanager
def entered_by_one(context: AbstractContextManager[Path]) -> Iterator[Path]:
    """Enter a context in one rank and yield its directory in all; a process alone just enters it.

    It is left when all ranks have come to the end, and all go on when it has been left. Where
    entering or leaving fails, it fails in every rank. A rank that raises in between waits for
    nobody: the context is left with an error, or by the end of its process.

    Args:
        context: makes a directory, and publishes it when it is left.

    Raises:
        ValueError: as ``context`` does.
        OSError: likewise.
    """
    if not is_distributed():
        with context as path:
            yield path
        return
    # every rank waits for the slowest: the time limit of other exchanges is not made for this
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        with ExitStack() as entered:
            made: Path | Exception | None = None
            if is_source_process():
                try:
                    made = entered.enter_context(context)
                except (ValueError, OSError) as error:
                    made = error
            yield _of_source(made, group)
            distributed.barrier(group)
            failed: Path | Exception = Path()
            try:
                entered.close()
            except (ValueError, OSError) as error:
                failed = error
            _of_source(failed, group)
    finally:
        distributed.destroy_process_group(group)


def _of_source(ours: Path | Exception | None, group: distributed.ProcessGroup) -> Path:
    """Return what one rank has made, in all ranks; raise what it has raised."""
    made: list[Path | Exception | None] = [ours]
    distributed.broadcast_object_list(made, src=get_source_rank(), group=group)
    if isinstance(made[0], Exception):
        raise made[0]
    assert made[0] is not None  # the source has one of the two
    return made[0]
