"""``moeq plan``: what a request will cost, before anything is spent on it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from moeq_plugin.cli.shared import app, errors, read_dataset, run_oneshot


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="model directory or id")],
    sensitivity: Annotated[
        Path, typer.Option(help="table of sensitivities; measured and written if it is not there")
    ],
    dataset: Annotated[
        Path | None, typer.Option(help="JSON lines with `text` or `input_ids`; default: EBSS")
    ] = None,
    num_calibration_samples: Annotated[int, typer.Option(help="sequences")] = 512,
    max_seq_length: Annotated[int, typer.Option(help="tokens per sequence")] = 2048,
    bits_per_weight: Annotated[
        list[float] | None, typer.Option(help="budget to allocate; may be given several times")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="scheme to choose from, such as W3A16_G64")
    ] = None,
    target: Annotated[str, typer.Option(help="vllm, gguf, expert or linear")] = "vllm",
    robust: Annotated[bool, typer.Option(help="minimise the worst domain")] = False,
    allocation: Annotated[
        Path | None, typer.Option(help="where to write the allocation of the last budget")
    ] = None,
) -> None:
    """Measure what every linear loses at every option, and allocate bits to budgets.

    Raises:
        typer.Exit: with code 2 if the request cannot be met.
    """
    from moeq_plugin.core.allocation import BitBudget, pareto_front
    from moeq_plugin.core.sensitivity import SensitivityTable

    with errors("plan"):
        if not sensitivity.exists():
            _measure(model, sensitivity, dataset, option, num_calibration_samples, max_seq_length)
        table = SensitivityTable.load(sensitivity)
        budgets = [BitBudget(bits_per_weight=bits) for bits in bits_per_weight or ()]
        front = pareto_front(table, budgets, target=target, robust=robust)
        for found in front:
            counts = Counter(found.choice.values())
            chosen = ", ".join(f"{counts[o]} {o}" for o in table.options if o in counts)
            size = (found.num_bytes + table.fixed_bytes) / 1e9
            typer.echo(
                f"{found.bits_per_weight:.4f} bits per weight, {size:.4g} GB: predicted loss "
                f"{found.value:.4g}; {chosen}"
            )
        if allocation is not None and front:
            front[-1].save(allocation)


def _measure(
    model: str,
    path: Path,
    dataset: Path | None,
    options: list[str] | None,
    num_calibration_samples: int,
    max_seq_length: int,
) -> None:
    from moeq_plugin.integrations.llm_compressor.sensitivity import SensitivityModifier

    modifier = SensitivityModifier(**({"options": options} if options else {}))
    run_oneshot(
        model,
        modifier,
        dataset="ebss" if dataset is None else read_dataset(dataset),
        num_calibration_samples=num_calibration_samples if dataset is not None else 128,
        max_seq_length=max_seq_length if dataset is not None else 512,
    )
    modifier.table.save(path)
    typer.echo(f"{path}: {len(modifier.table.rows)} linears at {len(modifier.options)} options")
