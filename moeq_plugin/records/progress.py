"""How far a long run is, reported to whoever listens: a terminal, a log, a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from moeq_plugin.core.names import place
from moeq_plugin.records.run import RunRecord

Phase = Literal["sample", "measure", "quantize", "save", "reference", "evaluate"]


@dataclass(frozen=True)
class Progress:
    """One step of a run.

    Attributes:
        phase: ``sample`` (the model writes its calibration set), ``measure`` (sensitivities),
            ``quantize``, ``save``, ``reference`` or ``evaluate`` (predictions of the model before
            and after).
        done: of ``total``, in ``unit``.
        total: see above.
        unit: ``tokens``, ``linears``, ``weights`` where not all of them are linears, or
            ``sequences``.
        layer: decoder layers finished, where the phase goes by layers.
        num_layers: of the model.
        worst_tokens: effective tokens of the linear that has fewest so far.
        worst_linear: its name.
        loss: sum over the last layer's linears of the mean squared change of their outputs.
    """

    phase: Phase
    done: int
    total: int
    unit: str
    layer: int | None = None
    num_layers: int | None = None
    worst_tokens: float | None = None
    worst_linear: str | None = None
    loss: float | None = None


_listeners: list[Callable[[Progress], None]] = []


@contextmanager
def listening(listener: Callable[[Progress], None]) -> Iterator[None]:
    """Call ``listener`` with every step of every run of this process, until the end."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def report_progress(progress: Progress) -> None:
    """Call all listeners with a step."""
    for listener in list(_listeners):
        listener(progress)


def layer_progress(
    phase: Phase, finished: Iterable[str], pending: Iterable[str], unit: str = "linears"
) -> Progress:
    """Return the progress of a phase that goes layer by layer.

    Args:
        phase: which.
        finished: names of the linears or weights that are done.
        pending: names of the others.
        unit: what they are.
    """
    finished, pending = list(finished), list(pending)
    to_do = _layers(pending)
    every = _layers(finished) | to_do
    total = len(finished) + len(pending)
    return Progress(phase, len(finished), total, unit, len(every - to_do), len(every))


def quantize_progress(run: RunRecord, num_finished_now: int, pending: Iterable[str]) -> Progress:
    """Return the progress of quantization, with what the records say of its health.

    Args:
        run: has a record of each linear or weight that is done.
        num_finished_now: how many of them, at the end, belong to the last layer.
        pending: names of the others.
    """
    records = run.linears
    layers = layer_progress("quantize", (record.name for record in records), pending, run.unit)
    worst = min(records, key=lambda record: record.effective_tokens, default=None)
    losses = [r.loss for r in records[len(records) - num_finished_now :] if r.loss is not None]
    return Progress(
        **{
            **vars(layers),
            "worst_tokens": worst and worst.effective_tokens,
            "worst_linear": worst and worst.name,
            "loss": sum(losses) if losses else None,
        }
    )


def _layers(names: Iterable[str]) -> set[int]:
    layers = (place(name).layer for name in names)
    return {layer for layer in layers if layer is not None}
