import contextlib
import os
import signal

import pytest

from moeq_plugin.cli.interrupts import interrupts_kept


@pytest.fixture(autouse=True)
def heed():
    """Whoever runs the tests in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_who_ignores_it_goes_on_ignoring_it():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_kept() as check:
        os.kill(os.getpid(), signal.SIGINT)
        check()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


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


def test_an_error_that_a_library_makes_of_an_interrupt_is_none_of_the_request():
    with pytest.raises(KeyboardInterrupt), interrupts_kept():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("no backend can be imported") from None


def test_an_error_that_nobody_interrupted_stays_what_it_is():
    with pytest.raises(ImportError, match="no backend"), interrupts_kept():
        raise ImportError("no backend can be imported")
