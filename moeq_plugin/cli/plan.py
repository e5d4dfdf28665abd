"""``moeq plan``: what a request will cost, before anything is spent on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeq_plugin.cli.data import ChatTemplate, Data, Datasets, MaxSeqLength, NumSamples
from moeq_plugin.cli.display import display
from moeq_plugin.cli.loading import TrustRemoteCode, run_oneshot
from moeq_plugin.cli.named_model import check_named, local
from moeq_plugin.cli.planned import (
    allocation_dict,
    allocation_line,
    plan_dict,
    plan_lines,
    prediction_line,
)
from moeq_plugin.cli.rwkv import is_rwkv, measuring_rwkv
from moeq_plugin.cli.shared import app, errors, say, say_json

if TYPE_CHECKING:
    from moeq_plugin.checkpoint.plan import Plan
    from moeq_plugin.cli.probe import Prediction


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="model directory or id")],
    sensitivity: Annotated[
        Path | None,
        typer.Option(help="allocate bits by this table; measured and written if it is not there"),
    ] = None,
    scheme: Annotated[str, typer.Option(help="without a table: such as W4A16_G64")] = "W4A16",
    tp: Annotated[int, typer.Option(help="without a table: ranks of tensor parallelism")] = 1,
    probe: Annotated[
        bool, typer.Option(help="quantize three layers on `dataset` and predict time and memory")
    ] = False,
    dataset: Datasets = None,
    chat_template: ChatTemplate = True,
    num_calibration_samples: NumSamples = 512,
    max_seq_length: MaxSeqLength = 2048,
    bits_per_weight: Annotated[
        list[float] | None, typer.Option(help="budget to allocate; may be given several times")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="candidate scheme of a budget, such as W3A16_G64; give several"),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="what may have a scheme of its own: what vllm or gguf reads, an expert, a linear"
        ),
    ] = "vllm",
    robust: Annotated[
        bool, typer.Option(help="minimise the loss of the worst domain, not the mean")
    ] = False,
    allocation: Annotated[
        Path | None, typer.Option(help="where to write the allocation of the last budget")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print as JSON")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say what quantizing a model gives, from its headers; or allocate bits to budgets.

    Raises:
        typer.Exit: with code 2 if the request cannot be met.
    """
    data = Data(tuple(dataset or ()), num_calibration_samples, max_seq_length, chat_template)
    with errors("plan"):
        if sensitivity is not None:
            _check_tables(model, data, sensitivity, allocation)
            if not sensitivity.exists():
                _measure(model, sensitivity, data, option, trust_remote_code)
            _allocate(sensitivity, bits_per_weight or [], target, robust, allocation, as_json)
            return
        _check_tableless(bits_per_weight, allocation, data if probe else None)
        directory = local(model)
        found = _from_headers(directory, scheme, tp)
        if not as_json:
            for line in plan_lines(found, scheme, directory):
                say(line)
        predicted = _probe(directory, found, scheme, data, trust_remote_code) if probe else None
        if as_json:
            say_json(json.dumps(plan_dict(found, scheme, directory, predicted), indent=1))
        elif predicted is not None:
            say(prediction_line(predicted))


def _check_tableless(
    bits: list[float] | None, allocation: Path | None, probed: Data | None
) -> None:
    """Refuse what needs a table or data, before anything is printed.

    Raises:
        ValueError: naming the option that is missing.
    """
    if bits or allocation is not None:
        raise ValueError("budgets and allocations need --sensitivity")
    if probed is not None and not probed.sources:
        raise ValueError("--probe needs --dataset FILE, the data that will calibrate")
    if probed is not None:
        probed.check()


def _from_headers(model: Path, scheme: str, tp: int) -> Plan:
    from moeq_plugin.checkpoint.plan import plan_quantization
    from moeq_plugin.checkpoint.presets import scheme_named
    from moeq_plugin.cli.built import build

    return plan_quantization(model, scheme_named(scheme), tp=tp, build=build)


def _check_tables(model: str, data: Data, sensitivity: Path, allocation: Path | None) -> None:
    """Refuse places that would overwrite something else, before anything is loaded."""
    from moeq_plugin.core.allocation import Allocation
    from moeq_plugin.core.sensitivity import SensitivityTable
    from moeq_plugin.files.places import check_new_file, check_places

    check_named(model)
    data.check()
    reads = {"MODEL": Path(model), **data.reads()}
    check_places(reads=reads, makes={"--allocation": allocation, "--sensitivity": sensitivity})
    check_new_file("--allocation", allocation, Allocation.load)
    if not sensitivity.exists():
        check_new_file("--sensitivity", sensitivity, SensitivityTable.load)


def _allocate(
    sensitivity: Path,
    bits: list[float],
    target: str,
    robust: bool,
    allocation: Path | None,
    as_json: bool,
) -> None:
    """Say what every budget gives, and write the choice for the last one where asked to."""
    from moeq_plugin.core.allocation import BitBudget, pareto_front
    from moeq_plugin.core.sensitivity import SensitivityTable
    from moeq_plugin.files.atomic import write_whole

    table = SensitivityTable.load(sensitivity)
    budgets = [BitBudget(bits_per_weight=each) for each in bits]
    front = pareto_front(table, budgets, target=target, robust=robust)
    if allocation is not None and front:
        write_whole(allocation, front[-1].save)
    if as_json:
        found = [allocation_dict(of, table) for of in front]
        say_json(json.dumps({"schema_version": 1, "allocations": found}, indent=1))
        return
    for of in front:
        say(allocation_line(of, table))


def _probe(
    model: Path, planned: Plan, scheme: str, data: Data, trust_remote_code: bool
) -> Prediction:
    """Predict time and memory from a run on a few layers."""
    from moeq_plugin.cli.probe import predict

    return predict(
        str(model),
        scheme,
        data,
        num_layers=planned.architecture.num_layers,
        moe_layers=planned.architecture.moe_layers,
        source_bytes=planned.source_bytes,
        trust_remote_code=trust_remote_code,
    )


def _measure(
    model: str,
    path: Path,
    data: Data,
    options: list[str] | None,
    trust_remote_code: bool,
) -> None:
    from moeq_plugin.files.atomic import write_whole
    from moeq_plugin.integrations.llm_compressor.allocation.sensitivity import SensitivityModifier

    asked: dict[str, Any] = {"options": options} if options else {}
    modifier = measuring_rwkv(**asked) if is_rwkv(model) else SensitivityModifier(**asked)
    with display(phases=["measure"], jsonl=False):
        run_oneshot(model, modifier, data, trust_remote_code=trust_remote_code, **data.or_written())
    write_whole(path, modifier.table.save)
    say(f"{path}: {len(modifier.table.rows)} linears at {len(modifier.options)} options", err=True)
