"""Where the bits went: layers, experts, and the budget."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from moeq_plugin.core.names import place
from moeq_plugin.report.charts import SERIES, Chart, Scale, heatmap, plot, whole_numbers, wrapped
from moeq_plugin.report.directory import Findings
from moeq_plugin.report.section import Section, number

_BITS = re.compile(r"W(\d+(?:\.\d+)?)")
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
            + wrapped(schemes.get((group, layer), ""))
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
