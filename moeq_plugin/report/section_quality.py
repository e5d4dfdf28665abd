"""How far the quantized model is from the original: texts, tasks and routers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeq_plugin.core.names import place
from moeq_plugin.records.quality import QualityRecord, TaskScore
from moeq_plugin.report.charts import SERIES, Chart, plot, whole_numbers
from moeq_plugin.report.directory import Findings
from moeq_plugin.report.section import Section, Table, number, percent, with_error


def quality_section(found: Findings) -> Section:
    """Return the section on quality."""
    section = Section("quality", "Quality")
    quality = found.quality
    if quality is None:
        section.missing.append(
            "Not measured: `moeq eval BASE QUANT --text FILE --json "
            f"{found.directory.name}/moeq_eval.json`, and `--tasks` for scores of tasks."
        )
        return section
    section.notes += _verdicts(quality)
    if quality.texts:
        section.parts.append(_texts(quality))
    if quality.tasks:
        section.parts.append(_tasks(quality))
    routed = {name: text["routing"] for name, text in quality.texts.items() if text["routing"]}
    if routed:
        section.parts.append(
            _per_layer("jaccard", "same experts (Jaccard)", "Share of common experts of a token's "
                       "two sets, by layer; 1 is perfect.", routed)
        )  # fmt: skip
        if all(of["router_kl"] is not None for of in routed.values()):
            section.parts.append(
                _per_layer("router_kl", "router KL (nats)", "KL of the routers' softmax from the "
                           "original's, by layer; 0 is perfect.", routed)
            )  # fmt: skip
    return section


def _verdicts(quality: QualityRecord) -> list[str]:
    found = []
    if len(quality.texts) > 1 and quality.worst_text is not None:
        kl = quality.texts[quality.worst_text]["kl"]
        found.append(f"Worst text: {quality.worst_text}, mean KL {number(kl)} nats per token.")
    worst = quality.worst_task
    if worst is not None:
        found.append(f"Worst task: {worst.task}, recovery {percent(worst.recovery)}.")
    layers = [
        (layer["jaccard"], layer["name"], name)
        for name, text in quality.texts.items()
        for layer in (text["routing"] or {"layers": []})["layers"]
    ]
    if layers:
        jaccard, layer, text = min(layers)
        found.append(
            f"Routing changes most in {layer} (on {text}): {percent(jaccard)} of the experts are "
            "common (Jaccard)."
        )
    return found


def _texts(quality: QualityRecord) -> Table:
    names = list(quality.texts)
    rows = [
        [label, *(cell(quality.texts[name]) for name in names)] for label, cell in _CELLS.items()
    ]
    # one column per text, so that many numbers of few texts fit a phone
    return Table("Distance from the original on each text, ± standard error over sequences",
                 ["", *names], rows)  # fmt: skip


def _cell(name: str) -> Any:
    return lambda text: with_error(text[name], text[f"{name}_stderr"])


def _of_routing(name: str) -> Any:
    def cell(text: Mapping[str, Any]) -> str:
        routing = text["routing"]
        return with_error(routing[name], routing[f"{name}_stderr"]) if routing else "–"

    return cell


_CELLS: dict[str, Any] = {
    "perplexity, original": _cell("reference_perplexity"),
    "perplexity, quantized": _cell("perplexity"),
    "log-loss added (nats per token)": _cell("nll_change"),
    "KL mean (nats)": _cell("kl"),
    "KL median": _cell("kl_median"),
    "KL 99 %": _cell("kl_p99"),
    "KL max": lambda text: number(text["kl_max"]),
    "same first token": _cell("top1_agreement"),
    "same experts (Jaccard)": _of_routing("jaccard"),
    "router KL (nats)": _of_routing("router_kl"),
    "sequences": lambda text: str(text["num_sequences"]),
    "tokens predicted": lambda text: str(text["num_tokens"]),
}


def _tasks(quality: QualityRecord) -> Table:
    worst = quality.worst_task
    rows = [_task(task) for task in quality.tasks]
    known = [task.recovery for task in quality.tasks if task.recovery is not None]
    if len(known) > 1:
        rows.append(["average", "", "", "", percent(sum(known) / len(known))])
    marked = frozenset(i for i, task in enumerate(quality.tasks) if task is worst)
    head = ["task", "metric", "original", "quantized", "recovery"]
    return Table("Tasks, ± standard error; the worst is marked", head, rows, 2, marked)


def _task(task: TaskScore) -> list[str]:
    metric = task.metric if task.higher_is_better else f"{task.metric} (less is better)"
    before = with_error(task.reference, task.reference_stderr)
    return [task.task, metric, before, with_error(task.score, task.stderr), percent(task.recovery)]


def _per_layer(name: str, title: str, caption: str, routed: Mapping[str, Any]) -> Chart:
    traces = []
    for index, (text, routing) in enumerate(routed.items()):
        layers = routing["layers"]
        color = SERIES[index % len(SERIES)]
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": text,
            "x": [place(layer["name"] + ".").layer or 0 for layer in layers],
            "y": [layer[name] for layer in layers],
            "error_y": {"type": "data", "array": [layer[f"{name}_stderr"] for layer in layers],
                        "color": color, "thickness": 1, "width": 3},
            "hovertext": [
                f"{text}, {layer['name']}<br>"
                f"{with_error(layer[name], layer[f'{name}_stderr'])}" for layer in layers
            ],
            "hovertemplate": "%{hovertext}<extra></extra>",
            "line": {"color": color, "width": 1.5}, "marker": {"color": color, "size": 7},
        })  # fmt: skip
    count = max(len(routing["layers"]) for routing in routed.values())
    return plot(
        name.replace("_", "-"),
        caption,
        traces,
        x={"title": {"text": "layer"}, **whole_numbers(count)},
        y={"title": {"text": title}},
        height=300,
    )
