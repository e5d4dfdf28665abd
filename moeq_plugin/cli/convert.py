"""``moeq convert``: the same codes in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moeq_plugin.cli.named_model import check_checkpoint
from moeq_plugin.cli.shared import app, errors, say


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="quantized checkpoint")],
    out: Annotated[Path, typer.Argument(help="new directory")],
    to: Annotated[str, typer.Option(help="gptq or compressed-tensors")],
    zero_points: Annotated[
        str | None,
        typer.Option(help="of GPTQ: gptq (version 1, default if symmetric) or gptq_v2"),
    ] = None,
    names: Annotated[
        str, typer.Option(help="of GPTQ's tensors: checkpoint, or modules for GPTQModel's Mixtral")
    ] = "checkpoint",
) -> None:
    """Convert between compressed-tensors and the GPTQ format without changing a number.

    Raises:
        typer.Exit: with code 2 if the other format cannot express the checkpoint.
    """
    with errors("convert"):
        check_checkpoint(source)
        from moeq_plugin.core.gptq_format import ZeroPoints
        from moeq_plugin.integrations.hf.gptq import convert as checkpoints
        from moeq_plugin.integrations.hf.gptq.companions import companions
        from moeq_plugin.integrations.hf.gptq.names import Names

        zeros = None if zero_points is None else ZeroPoints(zero_points)
        num_linears = checkpoints.convert(source, out, to, zero_points=zeros, names=Names(names))
        _, left = companions(source, without=checkpoints.OWN_FILES)
        if left:
            say(f"not copied: {', '.join(left)}", err=True)
        say(f"{out}: {num_linears} linears, not one code changed")
