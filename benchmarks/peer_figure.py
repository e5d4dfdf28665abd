"""Quality against CPU time, one point for each contender: a figure in plain SVG.

It brings its own background, so that it looks the same on light and on dark pages.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from peer_tables import measured

WIDTH, HEIGHT, GAP = 250, 210, 14  # of a panel, in pixels
LEFT, TOP, BOTTOM, HEAD = 46, 26, 40, 40
LEGEND_ROW, LEGEND_COLUMNS = 20, 4
PAPER, INK, FAINT = "#ffffff", "#1b1f24", "#d0d7de"
COLOURS = {"ours": "#0969da", "AutoRound": "#bc4c00"}  # by what the name contains
OTHERS = "#57606a"


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from ``start`` to ``end`` pixels."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> Axis:
        """Return an axis with a margin around all values."""
        low, high = math.log(min(values)), math.log(max(values))
        margin = max(0.12 * (high - low), 0.1)
        return cls(low - margin, high + margin, start, end)

    def __call__(self, value: float) -> float:
        """Return where a value is, in pixels."""
        share = (math.log(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return two or more round numbers, few enough for their labels not to overlap."""
        low, high = math.exp(self.low), math.exp(self.high)
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8)):
            ticks = [s * 10.0**e for e in exponents for s in steps if low <= s * 10.0**e <= high]
            if len(ticks) > 2 or (len(ticks) > 1 and steps == (1, 2, 5)):
                break
        return ticks


def figure() -> str:
    """Return the SVG: a row of panels for each model, a column for each grid."""
    found = {
        cell: [run for run in seeds.values() if "kl" in run] for cell, seeds in measured().items()
    }
    models, grids, names = (list(dict.fromkeys(of)) for of in zip(*found, strict=True))
    width = len(grids) * (WIDTH + GAP) + GAP
    rows = math.ceil(len(names) / LEGEND_COLUMNS)
    panels_end = HEAD + len(models) * (HEIGHT + GAP)
    height = panels_end + rows * LEGEND_ROW + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11" fill="{INK}">',
        "<title>Held-out KL divergence to the 16-bit model against CPU seconds</title>",
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        f'<text x="{GAP}" y="24" font-size="14" font-weight="bold">Held-out KL to 16 bit (up) '
        "against CPU seconds of quantization (right): lower left is better</text>",
    ]
    for row, model in enumerate(models):
        for column, grid in enumerate(grids):
            points = {
                number: (
                    statistics.median(run["cpu_s"] for run in runs),
                    statistics.mean(run["kl"] for run in runs),
                )
                for number, name in enumerate(names, 1)
                if (runs := found.get((model, grid, name)))
            }
            if points:
                x, y = GAP + column * (WIDTH + GAP), HEAD + row * (HEIGHT + GAP)
                parts += _panel(f"{model}, {grid}", points, names, x, y)
    for number, name in enumerate(names, 1):
        row, column = divmod(number - 1, LEGEND_COLUMNS)
        x = GAP + 10 + column * (width - GAP) / LEGEND_COLUMNS
        y = panels_end + row * LEGEND_ROW + 8
        parts += [*_marker(x, y, number, name), f'<text x="{x + 13:.0f}" y="{y + 4:.0f}">']
        parts[-1] += f"{escape(name)}</text>"
    return "\n".join([*parts, "</svg>"]) + "\n"


def colour_of(name: str) -> str:
    """Return the colour of a contender."""
    return next((of for part, of in COLOURS.items() if part in name), OTHERS)


def _panel(
    title: str, points: dict[int, tuple[float, float]], names: Sequence[str], x: float, y: float
) -> list[str]:
    right, bottom = x + WIDTH, y + HEIGHT
    seconds = Axis.over([of[0] for of in points.values()], x + LEFT, right - 8)
    losses = Axis.over([of[1] for of in points.values()], bottom - BOTTOM, y + TOP)
    parts = [f'<text x="{x + LEFT}" y="{y + 16}" font-weight="bold">{escape(title)}</text>']
    for tick in losses.ticks():
        at = losses(tick)
        parts.append(f'<path d="M{x + LEFT} {at:.1f}H{right - 8}" stroke="{FAINT}"/>')
        parts.append(f'<text x="{x + LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in seconds.ticks():
        at = seconds(tick)
        parts.append(f'<path d="M{at:.1f} {y + TOP}V{bottom - BOTTOM}" stroke="{FAINT}"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{bottom - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>'
        )
    for number, (cpu_s, kl) in points.items():
        parts += _marker(seconds(cpu_s), losses(kl), number, names[number - 1])
    return parts


def _marker(x: float, y: float, number: int, name: str) -> list[str]:
    return [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="{colour_of(name)}" stroke="{PAPER}">'
        f"<title>{escape(name)}</title></circle>",
        f'<text x="{x:.1f}" y="{y + 3.5:.1f}" text-anchor="middle" font-size="10" '
        f'fill="{PAPER}" pointer-events="none">{number}</text>',
    ]
