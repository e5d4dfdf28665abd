"""What several seeds say together."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def error(values: Sequence[float]) -> float:
    """Return the standard error of the mean."""
    return statistics.stdev(values) / len(values) ** 0.5


def change(ours: Sequence[float], base: Sequence[float]) -> str:
    """Return the mean of the paired changes in percent, and its standard error."""
    changes = [100 * (a / b - 1) for a, b in zip(ours, base, strict=True)]
    return f"{statistics.mean(changes):+.1f} ± {error(changes):.1f} %"
