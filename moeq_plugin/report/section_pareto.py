"""What other budgets would give: predicted loss over size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from moeq_plugin.report.charts import SERIES, log_axis, plot, wrapped
from moeq_plugin.report.directory import Findings
from moeq_plugin.report.section import Section, number, size, unit_of


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
        + wrapped(", ".join(f"{n} × {option}" for option, n in sorted(p["counts"].items())))
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
