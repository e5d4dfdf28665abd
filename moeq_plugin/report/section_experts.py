"""Are all experts calibrated: load and effective tokens of each, and who had to borrow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moeq_plugin.core.names import place
from moeq_plugin.records.run import Basis, LinearRecord
from moeq_plugin.report.charts import Chart, Scale, heatmap, log_scale, short
from moeq_plugin.report.directory import Findings
from moeq_plugin.report.section import Section, Table, number
from moeq_plugin.report.starved_rows import starved_rows

_MAX_ROWS = 40
IN_WORDS = {
    Basis.SHRUNK: "mixed with the layer's tokens",
    Basis.LAYER: "the layer's tokens only",
    Basis.FEW: "its own tokens, too few",
    Basis.NONE: "rounded to nearest",
}
_SHARES = Scale(
    "load of an expert, × an even share",
    -3.05,
    3.05,
    {-3.0: "≤ ⅛", -2.0: "¼", -1.0: "½", 0.0: "1", 1.0: "2", 2.0: "4", 3.0: "≥ 8"},
    is_diverging=True,
)


def experts_section(found: Findings) -> Section:
    """Return the section on experts and coverage."""
    section = Section("experts", "Expert load and coverage")
    if not found.linears:
        section.missing.append(
            "No moeq_run.json in this directory: quantize with MoEQuantModifier or `moeq quantize`."
        )
        return section
    effective = effective_tokens(found.linears)
    _add_loads(section, found, sorted(effective))
    if effective:
        section.parts.append(_effective_tokens_chart(found.linears, effective))
    else:
        section.notes.append("No routed experts among the quantized linears.")
    section.parts.append(_fallbacks(found.linears))
    return section


def effective_tokens(linears: Sequence[LinearRecord]) -> dict[int, dict[int, float]]:
    """Return for each layer and expert the fewest effective tokens of its linears."""
    found: dict[int, dict[int, float]] = {}
    for linear in linears:
        where = place(linear.name)
        if where.layer is not None and where.expert is not None:
            of_layer = found.setdefault(where.layer, {})
            tokens = min(of_layer.get(where.expert, math.inf), linear.effective_tokens)
            of_layer[where.expert] = tokens
    return found


def imbalance(load: Sequence[Sequence[int]]) -> float:
    """Return the mean over layers of the coefficient of variation of the experts' loads.

    Example:
        >>> imbalance([[2, 2], [4, 0]])
        0.5
    """
    variations = []
    for layer in load:
        mean = sum(layer) / len(layer)
        variance = sum((slots - mean) ** 2 for slots in layer) / len(layer)
        variations.append(math.sqrt(variance) / mean if mean else 0.0)
    return sum(variations) / len(variations)


def _add_loads(section: Section, found: Findings, layers: list[int]) -> None:
    """Add load on natural text and on the text that the model wrote, in one scale."""
    texts = found.quality.texts if found.quality is not None else {}
    routing = next((text["routing"] for text in texts.values() if text["routing"]), None)
    written = next((r.sampling.load for r in found.records if r.sampling is not None), [])
    if routing:
        totals = _sum([text["routing"]["layers"] for text in texts.values()])
        numbers = [place(of["name"] + ".").layer or 0 for of in routing["layers"]]
        text = "on the texts of `moeq eval`, before quantization"
        section.parts.append(_load_chart("load-natural", text, numbers, totals))
    else:
        section.missing.append(
            "Load on natural text: `moeq eval BASE QUANT --text FILE --json "
            f"{found.directory.name}/moeq_eval.json`."
        )
    if written:
        numbers = layers if len(layers) == len(written) else list(range(len(written)))
        text = "on the calibration text that the model wrote itself"
        section.parts.append(_load_chart("load-sampled", text, numbers, written))
    else:
        section.missing.append(
            "Load on self-sampled text: recorded when the model is quantized without a data set."
        )


def _sum(texts: Sequence[Sequence[dict[str, Sequence[int]]]]) -> list[list[int]]:
    """Return ``[layers][experts]``, the reference's load over all texts."""
    return [
        [sum(slots) for slots in zip(*(layer["reference_load"] for layer in layers), strict=True)]
        for layers in zip(*texts, strict=True)
    ]


def _load_chart(
    name: str, where: str, layers: Sequence[int], load: Sequence[Sequence[int]]
) -> Chart:
    values, hover = [], []
    for layer, slots in zip(layers, load, strict=True):
        even = sum(slots) / len(slots) or 1
        shares = [count / even for count in slots]
        values.append([max(-3.0, min(3.0, math.log2(s))) if s else -3.0 for s in shares])
        hover.append([
            f"layer {layer}, expert {expert}<br>{count} slots, {share:.2f} × an even share"
            for expert, (count, share) in enumerate(zip(slots, shares, strict=True))
        ])  # fmt: skip
    caption = (
        f"Expert load {where}: {sum(map(sum, load))} slots, coefficient of variation "
        f"{imbalance(load):.2f}."
    )
    return heatmap(name, caption, layers, values, hover, _SHARES)


def _effective_tokens_chart(
    linears: Sequence[LinearRecord], effective: dict[int, dict[int, float]]
) -> Chart:
    layers = sorted(effective)
    experts = range(1 + max(max(of_layer) for of_layer in effective.values()))
    weak: dict[tuple[int, int], Basis] = {}
    for linear in linears:
        where = place(linear.name)
        if linear.basis is not Basis.OWN and where.layer is not None and where.expert is not None:
            weak[where.layer, where.expert] = linear.basis
    values: list[list[float | None]] = []
    hover: list[list[str]] = []
    everything = [tokens for of_layer in effective.values() for tokens in of_layer.values()]
    scale = log_scale("effective tokens in calibration", everything)
    for layer in layers:
        tokens = [effective[layer].get(expert) for expert in experts]
        values.append([_log(t, scale.low) for t in tokens])
        hover.append([
            f"layer {layer}, expert {expert}<br>{number(t)} effective tokens"
            + (f"<br>{IN_WORDS[weak[layer, expert]]}" if (layer, expert) in weak else "")
            for expert, t in enumerate(tokens)
        ])  # fmt: skip
    marked = [(layers.index(layer), expert) for layer, expert in weak]
    rings = f"; a ring marks each of the {len(marked)} experts that borrowed" if marked else ""
    caption = (
        "Effective tokens, (Σa)² / Σa² of the weights of an expert's tokens, least of its linears: "
        f"{short(min(everything))} to {short(max(everything))}{rings}."
    )
    return heatmap("effective-tokens", caption, layers, values, hover, scale, marked)


def _log(tokens: float | None, low: float) -> float | None:
    if tokens is None:
        return None
    return math.log10(tokens) if tokens > 0 else low


def _fallbacks(linears: Sequence[LinearRecord]) -> Table:
    weak = sorted(
        starved_rows(linears),
        key=lambda row: (-list(Basis).index(row.basis), row.effective_tokens),
    )
    num_weak = sum(linear.basis is not Basis.OWN for linear in linears)
    rows = [[x.name, IN_WORDS[x.basis], number(x.effective_tokens)] for x in weak[:_MAX_ROWS]]
    more = f", the worst {_MAX_ROWS} of {len(weak)} rows" if len(weak) > _MAX_ROWS else ""
    caption = "Every linear rests on tokens of its own"
    if weak:
        caption = f"{num_weak} linears without enough tokens of their own{more}"
    marked = frozenset(i for i, x in enumerate(weak[:_MAX_ROWS]) if x.basis is Basis.NONE)
    return Table(caption, ["linear", "Hessian of", "effective tokens"], rows, 2, marked)
