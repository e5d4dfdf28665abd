import contextlib
import os
import signal

import pytest

from moeq_plugin.cli.interrupts import interrupts_kept


def test_a_swallowed_interrupt_is_raised_again():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts_kept() as check:
        check()
        with contextlib.suppress(BaseException):  # as some libraries do while they are imported
            os.kill(os.getpid(), signal.SIGINT)
        check()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_ends_what_runs_at_once():
    with pytest.raises(KeyboardInterrupt), interrupts_kept():
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("goes on")
