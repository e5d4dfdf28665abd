"""Where the bits went, what each module loses, and what other budgets would give."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from moeq_plugin.report.charts import SERIES, Chart, Scale, heatmap, log_axis, plot, whole_numbers
from moeq_plugin.report.directory import Findings
from moeq_plugin.report.names import place
from moeq_plugin.report.section import Section, Table, number, size, unit_of

_BITS = re.compile(r"W(\d+(?:\.\d+)?)")
_MAX_RANGES = 16  # layers
_ROUTED, _OTHERS = "routed experts", "other linears"


def bits_section(found: Findings) -> Section:
    """Return the section on bit allocation."""
    section = Section("bits", "Bit allocation")
    bits = bits_of_linears(found)
    if not bits:
        section.missing.append("No record of schemes: quantize with MoEQuantModifier.")
        return section
    if found.allocation is None:
        section.missing.append(
            "No budget was given, so schemes are as asked: for an allocation quantize with "
            "`bits_per_weight=` or `size_gb=`."
        )
    section.parts.append(_bars(found, bits))
    if _experts_differ(bits):
        section.parts.append(_map_of_bits(bits))
    return section


def bits_of_linears(found: Findings) -> dict[str, tuple[float, int]]:
    """Return for each linear its bits per weight and its weights.

    From the table and the allocation they are true bits, scales included; without these they are
    those that the scheme is named after, and every linear counts as one weight.
    """
    if found.table is not None and found.allocation is not None:
        column = {option: i for i, option in enumerate(found.table["options"])}
        rows = zip(
            found.table["rows"], found.table["num_bytes"], found.table["num_weights"], strict=True
        )
        choice = found.allocation["choice"]
        return {
            row: (8 * sizes[column[choice[row]]] / weights, weights)
            for row, sizes, weights in rows
            if choice.get(row) in column
        }
    named = ((linear.name, _BITS.search(linear.scheme)) for linear in found.linears)
    return {name: (float(of[1]), 1) for name, of in named if of is not None}


def _bars(found: Findings, bits: Mapping[str, tuple[float, int]]) -> Chart:
    sums: dict[str, dict[int, list[float]]] = {_ROUTED: {}, _OTHERS: {}}
    for name, (of_weight, weights) in bits.items():
        where = place(name)
        if where.layer is None:
            continue
        group = _OTHERS if where.expert is None else _ROUTED
        total = sums[group].setdefault(where.layer, [0.0, 0.0])
        total[0], total[1] = total[0] + of_weight * weights, total[1] + weights
    schemes = _schemes(found)
    layers = sorted({layer for group in sums.values() for layer in group})
    traces: list[dict[str, Any]] = []
    for color, (group, of_layers) in zip(SERIES, sums.items(), strict=False):
        shown = sorted(of_layers)
        heights = [of_layers[layer][0] / of_layers[layer][1] for layer in shown]
        hover = [
            f"layer {layer}, {group}<br>{height:.3f} bits per weight<br>"
            + _wrapped(schemes.get((group, layer), ""))
            for layer, height in zip(shown, heights, strict=True)
        ]
        if shown:
            traces.append({
                "type": "bar", "name": group, "x": shown, "y": heights, "hovertext": hover,
                "hovertemplate": "%{hovertext}<extra></extra>", "marker": {"color": color},
            })  # fmt: skip
    if found.allocation is not None and found.table is not None:
        budget = 8 * found.allocation["limit_bytes"] / sum(found.table["num_weights"])
        traces.append({
            "type": "scatter", "mode": "lines", "name": f"budget, {number(budget)} on average",
            "x": [min(layers, default=0) - 0.5, max(layers, default=0) + 0.5],
            "y": [budget, budget], "line": {"color": "$mark", "width": 2, "dash": "dash"},
            "hovertemplate": f"budget {number(budget)} bits per weight<extra></extra>",
        })  # fmt: skip
    kind = "true bits per weight, scales included" if found.table else "bits of the scheme"
    return plot(
        "bits",
        f"Bits of each layer ({kind}).",
        traces,
        x={"title": {"text": "layer"}, **whole_numbers(len(layers)), "showgrid": False},
        y={"title": {"text": "bits per weight"}, "rangemode": "tozero"},
        barmode="group",
        bargap=0.3,
        bargroupgap=0.08,
    )


def _schemes(found: Findings) -> dict[tuple[str, int], str]:
    """Return in words how many linears of a group got what."""
    counts: dict[tuple[str, int], Counter[str]] = {}
    choice = (found.allocation or {}).get("choice") or {x.name: x.scheme for x in found.linears}
    for name, scheme in choice.items():
        where = place(name)
        if where.layer is not None:
            group = _OTHERS if where.expert is None else _ROUTED
            counts.setdefault((group, where.layer), Counter())[scheme] += 1
    return {
        key: ", ".join(f"{n} × {scheme}" for scheme, n in sorted(of.items()))
        for key, of in counts.items()
    }


def _of_experts(bits: Mapping[str, tuple[float, int]]) -> dict[int, dict[int, tuple[float, int]]]:
    """Return for each layer and expert its stored bits and its weights."""
    sums: dict[int, dict[int, tuple[float, int]]] = {}
    for name, (of_weight, weights) in bits.items():
        where = place(name)
        if where.layer is not None and where.expert is not None:
            of_layer = sums.setdefault(where.layer, {})
            stored, count = of_layer.get(where.expert, (0.0, 0))
            of_layer[where.expert] = stored + of_weight * weights, count + weights
    return sums


def _experts_differ(bits: Mapping[str, tuple[float, int]]) -> bool:
    return any(
        len({round(stored / count, 6) for stored, count in of_layer.values()}) > 1
        for of_layer in _of_experts(bits).values()
    )


def _map_of_bits(bits: Mapping[str, tuple[float, int]]) -> Chart:
    sums = _of_experts(bits)
    layers = sorted(sums)
    values: list[list[float | None]] = []
    hover: list[list[str]] = []
    for layer in layers:
        of_layer = sums[layer]
        row = [of_layer[e][0] / of_layer[e][1] for e in sorted(of_layer)]
        values.append(list(row))
        hover.append([f"layer {layer}, expert {e}<br>{b:.3f} bits" for e, b in enumerate(row)])
    flat = [b for row in values for b in row if b is not None]
    low, high = min(flat), max(flat)
    ticks = {float(b): str(b) for b in range(17) if low <= b <= high}
    scale = Scale("bits per weight of an expert", low, high, ticks)
    return heatmap("bits-of-experts", "Bits of each expert.", layers, values, hover, scale)


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
            "x": [layer + 0.4 * (number_ / len(kinds) - 0.5) for layer in layers],
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


def pareto_section(found: Findings) -> Section:
    """Return the section on what other budgets would give."""
    section = Section("pareto", "Pareto front")
    if not found.front or found.table is None:
        section.missing.append(
            "No table of sensitivities: quantize with `bits_per_weight=`, or measure with "
            f"`moeq plan MODEL --sensitivity {found.directory.name}/moeq_sensitivity.json`."
        )
        return section
    points = [*found.front, *_uniform(found.table), *_chosen(found.allocation, found.table)]
    unit, name = unit_of(max(point["num_bytes"] for point in points))
    traces = [
        _points("best for its size", found.front, unit, "lines+markers", SERIES[0], "circle", 7),
        _points("one option for all", _uniform(found.table), unit, "markers", SERIES[1],
                "diamond", 10),
        _points("this checkpoint", _chosen(found.allocation, found.table), unit, "markers",
                "$mark", "star", 15),
    ]  # fmt: skip
    section.parts.append(
        plot(
            "pareto",
            "Predicted loss over the size of the checkpoint; every point of the front is the "
            "optimum for its bytes.",
            [trace for trace in traces if trace["x"]],
            x={"title": {"text": f"size of the checkpoint ({name})"}, "nticks": 6},
            y=log_axis("predicted loss (nats per token)", [point["loss"] for point in points]),
        )
    )
    return section


def _chosen(allocation: dict[str, Any] | None, table: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the checkpoint's own point; none where its value is a ratio and not a loss."""
    if allocation is None or allocation["robust"]:
        return []
    return [{
        "num_bytes": allocation["num_bytes"] + table["fixed_bytes"],
        "bits_per_weight": allocation["bits_per_weight"],
        "loss": allocation["value"],
        "counts": dict(Counter(allocation["choice"].values())),
    }]  # fmt: skip


def _points(
    name: str,
    points: Sequence[dict[str, Any]],
    unit: float,
    mode: str,
    color: str,
    symbol: str,
    width: int,
) -> dict[str, Any]:
    hover = [
        f"{name}<br>{size(p['num_bytes'])}, {number(p['bits_per_weight'])} bits per "
        f"weight<br>{number(p['loss'])} nats per token<br>"
        + _wrapped(", ".join(f"{n} × {option}" for option, n in sorted(p["counts"].items())))
        for p in points
    ]
    return {
        "type": "scatter", "mode": mode, "name": name, "x": [p["num_bytes"] / unit for p in points],
        "y": [p["loss"] for p in points], "hovertext": hover,
        "hovertemplate": "%{hovertext}<extra></extra>", "line": {"color": color, "width": 1.5},
        "marker": {"color": color, "size": width, "symbol": symbol},
    }  # fmt: skip


def _uniform(table: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one point per option that every row can have and that loses something."""
    points = []
    for column, option in enumerate(table["options"]):
        losses = [row[column] for domain in table["loss"] for row in domain]
        stored = sum(row[column] for row in table["num_bytes"])
        if None not in losses and sum(losses) > 0:
            points.append({
                "num_bytes": stored + table["fixed_bytes"],
                "bits_per_weight": 8 * stored / sum(table["num_weights"]),
                "loss": sum(losses) / len(table["domains"]),
                "counts": {option: len(table["rows"])},
            })  # fmt: skip
    return points


def _wrapped(text: str) -> str:
    return "<br>".join(textwrap.wrap(text, 44))
