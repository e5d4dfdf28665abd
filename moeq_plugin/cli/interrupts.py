"""Ctrl-C that is not lost: libraries that are being imported swallow what it raises."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_kept() -> Iterator[Callable[[], None]]:
    """Note every Ctrl-C inside; yield what raises it again if nobody has ended for it.

    Ctrl-C raises ``KeyboardInterrupt`` as always. Some libraries catch everything while they are
    imported, and the run would go on as if nothing had been typed; or they raise an error of their
    own instead, which would look like a fault of the request.
    """
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_default or threading.current_thread() is not threading.main_thread():
        # signals are of the main thread, and who runs in the background is to ignore this one
        yield lambda: None
        return
    typed = []

    def note(_number: int, _frame: FrameType | None) -> None:
        typed.append(True)
        raise KeyboardInterrupt

    def check() -> None:
        if typed:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield check
    except Exception:
        check()
        raise
    finally:
        signal.signal(signal.SIGINT, before)
