"""Charts as plain data for plotly.js, one function per form.

Colours are names of the page's CSS variables behind a dollar sign; the page's script puts in what
they are in the reader's scheme, and again when that changes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ROW, _HEAD = 26, 118  # pixels of a heatmap's row, and of everything around its rows
SERIES = ("$series1", "$series2", "$series3", "$series4", "$series5", "$series6", "$series7")
_DIVERGING = [[0, "$low"], [0.5, "$middle"], [1, "$high"]]
_SEQUENTIAL = [[0, "$scale0"], [0.5, "$scale1"], [1, "$scale2"]]


@dataclass(frozen=True)
class Chart:
    """A chart and what it says in words.

    Attributes:
        name: unique on the page.
        caption: what is shown, for every reader, with or without eyes.
        data: plotly's traces.
        layout: plotly's layout.
    """

    name: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """A colour scale.

    Attributes:
        title: quantity and unit.
        low: value of one end.
        high: of the other.
        ticks: value to label.
        is_diverging: two colours away from the middle instead of one that grows.
    """

    title: str
    low: float
    high: float
    ticks: dict[float, str]
    is_diverging: bool = False


def log_scale(title: str, values: Sequence[float]) -> Scale:
    """Return a scale of log10, over the positive of some values, with 1, 2 and 5 as ticks."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = math.log10(min(positive)), math.log10(max(positive))
    if high - low < 0.3:  # all but equal: do not blow up what is noise
        low, high = low - 0.15, high + 0.15
    steps = (1, 2, 5) if high - low < 2.6 else (1,)
    marks = [s * 10**e for e in range(math.floor(low), math.ceil(high) + 1) for s in steps]
    ticks = {math.log10(m): short(m) for m in marks if low <= math.log10(m) <= high}
    return Scale(title, low, high, ticks)


def log_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """Return a logarithmic axis with plain numbers as ticks."""
    scale = log_scale(title, values)
    ticks = {10**exponent: label for exponent, label in scale.ticks.items()}
    return {
        "title": {"text": title}, "type": "log", "tickmode": "array",
        "tickvals": list(ticks), "ticktext": list(ticks.values()),
    }  # fmt: skip


def short(number: float) -> str:
    """Return a few characters for an axis.

    Example:
        >>> short(20000), short(1500), short(0.05), short(12)
        ('20k', '1.5k', '0.05', '12')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def heatmap(
    name: str,
    caption: str,
    layers: Sequence[int],
    values: Sequence[Sequence[float | None]],
    hover: Sequence[Sequence[str]],
    scale: Scale,
    marked: Sequence[tuple[int, int]] = (),
) -> Chart:
    """Return layer x expert.

    Args:
        name: of the chart.
        caption: of the chart.
        layers: their numbers, one per row.
        values: ``[layers][experts]``; ``None`` where there is nothing.
        hover: what to show on each cell.
        scale: of the colours.
        marked: (row, expert) of cells that get a mark.
    """
    height = min(760, _HEAD + max(3, len(layers)) * _ROW)
    # title above bar above cells, from the top edge: beside them a phone has no room, and inside
    # the plot's own coordinates they would move with the number of rows
    top = {"yref": "container", "yanchor": "top"}
    bar = {
        **top, "orientation": "h", "x": 0.5, "xanchor": "center", "y": 1 - 22 / height, "len": 1,
        "thickness": 10, "outlinewidth": 0, "ypad": 6, "ticks": "outside", "ticklen": 3,
        "tickvals": list(scale.ticks), "ticktext": list(scale.ticks.values()),
    }  # fmt: skip
    title = {
        **top,
        "text": scale.title,
        "x": 0.5,
        "xref": "paper",
        "y": 1 - 3 / height,
        "font": {"size": 13},
    }
    columns = max(map(len, values))
    gap = int(columns <= 32)  # many experts on a phone have no pixel to spare
    labels = [str(layer) for layer in layers]
    cells = {
        "type": "heatmap", "z": values, "y": labels, "text": hover, "hoverongaps": False,
        "hovertemplate": "%{text}<extra></extra>", "zmin": scale.low, "zmax": scale.high,
        "colorscale": _DIVERGING if scale.is_diverging else _SEQUENTIAL,
        "colorbar": bar, "xgap": gap, "ygap": gap,
    }  # fmt: skip
    marks = {
        "type": "scatter", "mode": "markers", "x": [e for _, e in marked],
        "y": [labels[row] for row, _ in marked], "hoverinfo": "skip", "showlegend": False,
        "marker": {
            "symbol": "circle-open", "size": 4 + 5 * gap, "color": "$mark",
            "line": {"width": 1 + gap},
        },
    }  # fmt: skip
    layout = {
        "height": height, "title": title, "margin": {"l": 48, "r": 12, "t": 66, "b": 46},
        "xaxis": {"title": {"text": "expert"}, "range": [-0.5, columns - 0.5], "showgrid": False,
                  "zeroline": False, **whole_numbers(columns)},
        "yaxis": {"title": {"text": "layer"}, "type": "category", "showgrid": False,
                  "range": [len(layers) - 0.5, -0.5], "nticks": 16},
    }  # fmt: skip
    return Chart(name, caption, [cells, marks] if marked else [cells], layout)


def plot(
    name: str,
    caption: str,
    traces: list[dict[str, Any]],
    *,
    x: dict[str, Any],
    y: dict[str, Any],
    height: int = 340,
    **layout: Any,
) -> Chart:
    """Return a chart with two axes and, if traces have names, a legend above it.

    Args:
        name: of the chart.
        caption: of the chart.
        traces: plotly's.
        x: plotly's axis.
        y: plotly's axis.
        height: pixels.
        layout: what else plotly's layout has.
    """
    named = [t for t in traces if t.get("name") and t.get("showlegend", True)]
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    return Chart(
        name,
        caption,
        traces,
        {
            "height": height,
            "margin": {"l": 64, "r": 14, "t": 20, "b": 50},
            "showlegend": bool(named),
            "legend": legend,
            "xaxis": {"zeroline": False, **x},
            "yaxis": {"zeroline": False, **y},
            **layout,
        },
    )


def whole_numbers(count: int) -> dict[str, Any]:
    """Return the ticks of an axis that counts from 0: whole, and no more than fit a phone."""
    most = 16 if count <= 100 else 9  # longer numbers, fewer of them
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256) if count / s <= most or s == 256)
    return {"tickmode": "linear", "tick0": 0, "dtick": step, "tickangle": 0}


def wrapped(text: str) -> str:
    """Return lines short enough for a label on hover."""
    return "<br>".join(textwrap.wrap(text, 44))
