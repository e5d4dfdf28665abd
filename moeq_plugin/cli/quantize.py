"""``moeq quantize``: a checkpoint from a model and a wish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moeq_plugin.cli.shared import app, errors, read_dataset, run_oneshot


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="model directory or id")],
    out: Annotated[Path, typer.Argument(help="new directory for the checkpoint")],
    scheme: Annotated[str | None, typer.Option(help="such as W4A16")] = None,
    bits_per_weight: Annotated[float | None, typer.Option(help="budget instead")] = None,
    size_gb: Annotated[float | None, typer.Option(help="of the checkpoint, instead")] = None,
    allocation: Annotated[Path | None, typer.Option(help="of `moeq plan`, instead")] = None,
    sensitivity: Annotated[Path | None, typer.Option(help="table of `moeq plan`")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="scheme to choose from, such as W3A16_G64")
    ] = None,
    target: Annotated[str, typer.Option(help="vllm, gguf, expert or linear")] = "vllm",
    dataset: Annotated[
        Path | None, typer.Option(help="JSON lines with `text` or `input_ids`; default: EBSS")
    ] = None,
    num_calibration_samples: Annotated[int, typer.Option(help="sequences")] = 512,
    max_seq_length: Annotated[int, typer.Option(help="tokens per sequence")] = 2048,
) -> None:
    """Quantize a model to a scheme, a budget or an allocation made before.

    Raises:
        typer.Exit: with code 2 if the request cannot be met.
    """
    wanted = {
        "scheme": scheme,
        "bits_per_weight": bits_per_weight,
        "size_gb": size_gb,
        "allocation": None if allocation is None else str(allocation),
    }
    if sum(wish is not None for wish in wanted.values()) != 1:
        names = "--scheme, --bits-per-weight, --size-gb and --allocation"
        typer.echo(f"moeq quantize: give exactly one of {names}", err=True)
        raise typer.Exit(2)
    with errors("quantize"):
        from moeq_plugin import MoEQuantModifier

        settings: dict[str, Any] = {k: v for k, v in wanted.items() if v is not None}
        settings |= {"options": option} if option else {}
        settings |= {"sensitivity": str(sensitivity)} if sensitivity is not None else {}
        recipe = MoEQuantModifier(**settings, target=target, ignore=["lm_head"])
        run_oneshot(
            model,
            recipe,
            dataset=read_dataset(dataset),
            num_calibration_samples=num_calibration_samples,
            max_seq_length=max_seq_length,
            output_dir=str(out),
        )
        typer.echo(f"{out}: written")
