"""What a long run shows: one live line on a terminal, plain lines or JSON elsewhere."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from moeq_plugin.cli.interrupts import interrupts_kept
from moeq_plugin.cli.shared import say, say_json
from moeq_plugin.records.progress import Progress, listening
from moeq_plugin.untrusted.text import harmless

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def display(*, phases: list[str], jsonl: bool) -> Iterator[None]:
    """Show every step of the runs inside.

    Args:
        phases: that will come, in order, to say which are still to follow.
        jsonl: print one JSON object per step instead, to standard output.
    """
    timed, console = Timed(phases), Console(stderr=True)
    with ExitStack() as stack:
        check = stack.enter_context(interrupts_kept())
        listener: Callable[[Progress], None]
        if jsonl:
            listener = partial(_print_json, timed)
        elif console.is_terminal:
            # before the imports, which take seconds; what others print stands above it
            status = stack.enter_context(Status("loading", console=console))
            listener = partial(_update, status, timed)
        else:
            listener = _Lines(timed)
        if find_spec("llmcompressor") is not None:
            log_to(console)
            from moeq_plugin.integrations.llm_compressor.host import quiet

            stack.enter_context(quiet())
            # those of ours are for Python: a command says the same in lines of its own
            warnings.filterwarnings("ignore", category=UserWarning, module="moeq_plugin")
        check()
        stack.enter_context(listening(listener))
        stack.enter_context(listening(lambda _: check()))
        yield


def _print_json(timed: Timed, step: Progress) -> None:
    say_json(json.dumps(timed.event(step)))


def _update(status: Status, timed: Timed, step: Progress) -> None:
    # no markup of Rich's either, and one line however narrow the terminal is
    status.update(Text(harmless(timed.line(step)), no_wrap=True, overflow="ellipsis"))


class Timed:
    """Adds time, time left and memory to steps.

    Args:
        phases: that will come, in order.
        clock: seconds, for tests.
    """

    def __init__(self, phases: list[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._phases, self._clock = phases, clock
        self._began = clock()
        self._phase: str | None = None
        self._phase_began, self._phase_start = self._began, 0

    def event(self, step: Progress) -> dict[str, Any]:
        """Return a step with what is known about it, for machines."""
        from moeq_plugin.records.environment import peak_memory

        now = self._clock()
        if step.phase != self._phase:
            self._phase, self._phase_began, self._phase_start = step.phase, now, step.done
        done, left = step.done - self._phase_start, step.total - step.done
        eta = (now - self._phase_began) / done * left if done > 0 else None
        return {
            **asdict(step),
            "elapsed_s": now - self._began,
            "eta_s": eta,
            "then": self._following(step.phase),
            "peak_memory_gb": peak_memory() / 1e9,
        }

    def line(self, step: Progress) -> str:
        """Return the same in words, for people."""
        event = self.event(step)
        parts: list[str] = [step.phase]
        if step.layer is not None:
            parts.append(f"{step.layer} of {step.num_layers} layers done")
        if step.phase == "save":
            parts.append(f"writing {step.total} {step.unit}")
        else:
            parts.append(f"{step.done}/{step.total} {step.unit}")
        parts.append(f"elapsed {_clock_time(event['elapsed_s'])}")
        if event["eta_s"] is not None:
            then = f", then {' and '.join(event['then'])}" if event["then"] else ""
            parts.append(f"left {_clock_time(event['eta_s'])}{then}")
        if step.worst_tokens is not None:
            parts.append(f"fewest effective tokens {step.worst_tokens:.0f} ({step.worst_linear})")
        if step.loss is not None:
            parts.append(f"squared output error of the layer {step.loss:.3g}")
        parts.append(f"memory {event['peak_memory_gb']:.1f} GB")
        return " · ".join(parts)

    def _following(self, phase: str) -> list[str]:
        if phase not in self._phases:
            return []
        return self._phases[self._phases.index(phase) + 1 :]


class _Lines:
    """Prints the first and last step of a phase, and one every ten seconds between."""

    def __init__(self, timed: Timed) -> None:
        self._timed = timed
        self._phase, self._last = "", 0.0

    def __call__(self, step: Progress) -> None:
        text, now = self._timed.line(step), time.monotonic()
        is_due = now - self._last > _SECONDS_BETWEEN_LINES
        if is_due or step.phase != self._phase or step.done == step.total:
            self._phase, self._last = step.phase, now
            say(text, err=True)


def log_to(console: Console) -> None:
    """Print our warnings, and errors of all, above the live line; the host prints to stdout.

    Args:
        console: to print to.
    """
    import llmcompressor  # noqa: F401
    from loguru import logger

    def show(text: str) -> None:
        for line in text.rstrip("\n").splitlines():
            console.print(harmless(line), markup=False, highlight=False, soft_wrap=True)

    # torch remarks once that it is being traced, which is how a model is cut into layers
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    logger.remove()
    logger.add(
        show,
        format="{level}: {message}",
        filter={"moeq_plugin": "WARNING", "": "ERROR"},
    )


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
