"""What each module loses, as far as its second moments see it."""

from __future__ import annotations

from collections.abc import Sequence

from moeq_plugin.core.names import place
from moeq_plugin.report.charts import SERIES, Chart, log_axis, plot, whole_numbers
from moeq_plugin.report.directory import Findings
from moeq_plugin.report.section import Section, Table, number

_MAX_RANGES = 16  # layers


def loss_section(found: Findings) -> Section:
    """Return the section on the loss of every module."""
    section = Section("loss", "Loss per module")
    losses = [(x.name, x.loss) for x in found.linears if x.loss is not None]
    if not losses:
        section.missing.append("No losses: only GPTQ with moeq-plugin's own solver records them.")
        return section
    section.parts.append(_losses(losses))
    worst = sorted(losses, key=lambda pair: -pair[1])[:10]
    rows = [[name, number(loss)] for name, loss in worst]
    section.parts.append(Table("Largest losses", ["linear", "loss"], rows))
    return section


def _losses(losses: Sequence[tuple[str, float]]) -> Chart:
    """Return the mean of every kind in every layer, with the range of its experts."""
    kinds: dict[str, dict[int, list[tuple[float, str]]]] = {}
    for name, loss in losses:
        where = place(name)
        kinds.setdefault(where.kind, {}).setdefault(where.layer or 0, []).append((loss, name))
    num_layers = 1 + max(max(of_layers) for of_layers in kinds.values())
    has_ranges = num_layers <= _MAX_RANGES  # more would hide the lines; hovering tells
    ranges = "; bars reach from the least to the most changed expert" if has_ranges else ""
    traces = []
    # kinds beyond the colours there are share the last one
    for number_, (kind, of_layers) in enumerate(sorted(kinds.items())):
        layers = sorted(of_layers)
        means = [sum(x for x, _ in of_layers[i]) / len(of_layers[i]) for i in layers]
        lows, highs = ([pick(of_layers[i])[0] for i in layers] for pick in (min, max))
        hover = [
            f"{kind}, layer {layer}<br>mean {number(mean)}"
            + (f"<br>{number(low)} to {number(high)}" if high > low else "")
            + f"<br>largest: {max(of_layers[layer])[1]}"
            for layer, mean, low, high in zip(layers, means, lows, highs, strict=True)
        ]
        color = SERIES[min(number_, len(SERIES) - 1)]
        trace = {
            "type": "scatter", "mode": "lines+markers", "name": kind, "y": means,
            "x": layers,
            "hovertext": hover, "hovertemplate": "%{hovertext}<extra></extra>",
            "line": {"color": color, "width": 1.5}, "marker": {"color": color, "size": 6},
        }  # fmt: skip
        if highs != lows and has_ranges:
            trace["error_y"] = {
                "type": "data", "symmetric": False, "thickness": 1, "width": 2, "color": color,
                "array": [h - m for h, m in zip(highs, means, strict=True)],
                "arrayminus": [m - low for m, low in zip(means, lows, strict=True)],
            }  # fmt: skip
        traces.append(trace)
    return plot(
        "losses",
        f"Mean squared change of a module's output vector{ranges}. Scales differ between kinds of "
        "modules, so compare within one.",
        traces,
        x={"title": {"text": "layer"}, **whole_numbers(num_layers)},
        y=log_axis("loss (squared output)", [loss for _, loss in losses]),
        height=400,
    )
