"""``moeq inspect``: what a model is and who reads it, from config and headers."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from moeq_plugin.cli.named_model import local
from moeq_plugin.cli.shared import app, errors, say, say_json
from moeq_plugin.core.dense_words import layers_without_experts

if TYPE_CHECKING:
    from moeq_plugin.checkpoint.overview import Overview


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(help="directory of a model, its config.json, or an id in the hub's cache"),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
) -> None:
    """Describe a model in seconds, without reading a weight.

    Raises:
        typer.Exit: with code 2 if there is no model.
    """
    with errors("inspect"):
        from moeq_plugin.checkpoint.overview import inspect_model
        from moeq_plugin.cli.built import build
        from moeq_plugin.integrations.llama_cpp.tensor_names import tensor_names

        found = inspect_model(local(model), build, tensor_names)
        if as_json:
            say_json(json.dumps(found.to_dict(), indent=1))
            return
        say(
            f"{found.family}{_source(found)}, {found.num_parameters / 1e9:.3g} B parameters"
            + (f", {found.num_active / 1e9:.3g} B active" if found.num_moe_layers else "")
        )
        say(_experts(found))
        for line in _layers(found):
            say(line)
        for reader, limits in found.readers.items():
            say(f"{reader}: {'; '.join(limits) or 'yes'}")
        if found.refusal:
            say(f"quantize: {found.refusal}")


def _experts(found: Overview) -> str:
    if found.num_moe_layers:
        return (
            f"{found.num_moe_layers} of {found.num_layers} layers with {found.num_experts} "
            f"experts, {found.top_k} per token, {found.num_shared} shared; experts {found.experts}"
        )
    return layers_without_experts(found.family, found.num_layers)


def _source(found: Overview) -> str:
    """Say where what is said about the model is from, if not from what we know of its family."""
    if found.is_known:
        return ""
    way = "built without weights to find out" if found.is_built else "read off the file"
    return f" (not a family that we know: {way})"


def _layers(found: Overview) -> list[str]:
    """Return a line for each run of layers that are alike."""
    lines = []
    for schemes, run in groupby(found.layers, key=lambda layer: found.layers[layer]):
        layers = list(run)
        span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        lines.append(f"{span}: " + ", ".join(f"{n} x {name}" for name, n in schemes.items()))
    return lines
