"""``moeq plan``: what a request will cost, before anything is spent on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeq_plugin.cli.data import ChatTemplate, Data, Datasets, MaxSeqLength, NumSamples
from moeq_plugin.cli.display import display
from moeq_plugin.cli.loading import TrustRemoteCode, run_oneshot
from moeq_plugin.cli.named_model import check_named, local
from moeq_plugin.cli.shared import app, errors, say

if TYPE_CHECKING:
    from moeq_plugin.checkpoint.plan import Plan
    from moeq_plugin.core.allocation import Allocation
    from moeq_plugin.core.sensitivity import SensitivityTable


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
        list[str] | None, typer.Option(help="scheme to choose from, such as W3A16_G64")
    ] = None,
    target: Annotated[str, typer.Option(help="vllm, gguf, expert or linear")] = "vllm",
    robust: Annotated[bool, typer.Option(help="minimise the worst domain")] = False,
    allocation: Annotated[
        Path | None, typer.Option(help="where to write the allocation of the last budget")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say what quantizing a model gives, from its headers; or allocate bits to budgets.

    Raises:
        typer.Exit: with code 2 if the request cannot be met.
    """
    data = Data(tuple(dataset or ()), num_calibration_samples, max_seq_length, chat_template)
    if sensitivity is None:
        if bits_per_weight or allocation is not None:
            say("moeq plan: budgets and allocations need --sensitivity", err=True)
            raise typer.Exit(2)
        with errors("plan"):
            for line in _from_headers(model, scheme, tp):
                say(line)
            if probe:
                say(_probe(model, scheme, data, trust_remote_code))
        return
    from moeq_plugin.core.allocation import Allocation, BitBudget, pareto_front
    from moeq_plugin.core.sensitivity import SensitivityTable
    from moeq_plugin.files.atomic import write_whole
    from moeq_plugin.files.places import check_new_file, check_places

    with errors("plan"):
        check_named(model)
        data.check()
        reads = {"MODEL": Path(model), **data.reads()}
        check_places(reads=reads, makes={"--allocation": allocation, "--sensitivity": sensitivity})
        check_new_file("--allocation", allocation, Allocation.load)
        if not sensitivity.exists():
            check_new_file("--sensitivity", sensitivity, SensitivityTable.load)
            _measure(model, sensitivity, data, option, trust_remote_code)
        table = SensitivityTable.load(sensitivity)
        budgets = [BitBudget(bits_per_weight=bits) for bits in bits_per_weight or ()]
        front = pareto_front(table, budgets, target=target, robust=robust)
        for found in front:
            say(_in_words(found, table))
        if allocation is not None and front:
            write_whole(allocation, front[-1].save)


def _in_words(found: Allocation, table: SensitivityTable) -> str:
    counts = Counter(found.choice.values())
    chosen = ", ".join(f"{counts[o]} {o}" for o in table.options if o in counts)
    size = (found.num_bytes + table.fixed_bytes) / 1e9
    return (
        f"{found.bits_per_weight:.4f} bits per weight, {size:.4g} GB: predicted loss "
        f"{found.value:.4g}; {chosen}"
    )


def _from_headers(model: str, scheme: str, tp: int) -> Iterator[str]:
    """Yield what quantization will do and write, and what servers will not do with it."""
    from moeq_plugin.checkpoint.plan import plan_quantization
    from moeq_plugin.checkpoint.presets import scheme_named
    from moeq_plugin.cli.built import build

    parsed = scheme_named(scheme)
    found = plan_quantization(local(model), parsed, tp=tp, build=build)
    arch = found.architecture
    yield (
        f"{arch.family}: {arch.num_layers} layers, {len(arch.moe_layers)} with {arch.num_experts} "
        f"experts, {arch.top_k} per token, {arch.num_shared} shared"
    )
    roles = Counter(found.kept.values())
    yield (
        f"quantized: {len(found.quantized)} linears, {found.quantized_frac:.1%} of all parameters, "
        f"to {parsed.describe()}; in 16 bit: "
        + (", ".join(f"{count} x {role}" for role, count in roles.items()) or "no linear")
    )
    file = "several files" if found.file_bytes is None else f"a file of {found.file_bytes} bytes"
    yield f"{found.source_bytes} bytes of tensors become {found.tensor_bytes}, {file}"
    yield _in_short(found, local(model))
    if found.num_copied:
        yield (
            f"next-token prediction: {found.num_copied} tensors of {found.copied_bytes} bytes "
            "among them, copied as they are: transformers does not load them, servers draft "
            "with them"
        )
    if found.misfits:
        some = ", ".join(found.misfits[:3])
        yield (
            f"refused: groups of {parsed.group_size} do not divide the columns of "
            f"{len(found.misfits)} linears ({some}): use another group size, such as {scheme}_G32, "
            "or `ignore` them"
        )
    for warning in found.warnings:
        yield f"warning: {warning.where}: {warning.what}; {warning.way_out}"


def _in_short(found: Plan, model: Path) -> str:
    """Return sizes in the units that people buy memory in, with what serving takes."""
    from moeq_plugin.checkpoint.serving_memory import cache_bytes_per_token
    from moeq_plugin.report.section import size
    from moeq_plugin.untrusted.reading import read_json

    cache = cache_bytes_per_token(read_json(model / "config.json"))
    of_cache = "" if cache is None else f" and {size(1000 * cache)} for 1,000 tokens of context"
    return (
        f"{size(found.source_bytes)} become {size(found.tensor_bytes)}; a server needs "
        f"{size(found.tensor_bytes)} for the weights{of_cache}"
    )


def _probe(model: str, scheme: str, data: Data, trust_remote_code: bool) -> str:
    """Predict time and memory from a run on a few layers.

    Raises:
        ValueError: if there is no data to run them on.
    """
    from moeq_plugin.checkpoint.plan import plan_quantization
    from moeq_plugin.checkpoint.presets import scheme_named
    from moeq_plugin.cli.built import build
    from moeq_plugin.cli.probe import predict

    if not data.sources:
        raise ValueError("--probe needs --dataset FILE, the data that will calibrate")
    data.check()
    directory = local(model)
    planned = plan_quantization(directory, scheme_named(scheme), build=build)
    found = predict(
        str(directory),
        scheme,
        data,
        num_layers=planned.architecture.num_layers,
        moe_layers=planned.architecture.moe_layers,
        source_bytes=planned.source_bytes,
        trust_remote_code=trust_remote_code,
    )
    return (
        f"probe of {found.num_layers} layers on {found.num_sequences} sequences: quantizing takes "
        f"{found.cpu_seconds:.0f} s of CPU time, {found.seconds:.0f} s as busy as the machine is "
        f"now, and {found.peak_bytes / 2**20:.0f} MiB of memory"
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

    modifier = SensitivityModifier(options=options) if options else SensitivityModifier()
    with display(phases=["measure"], jsonl=False):
        run_oneshot(model, modifier, data, trust_remote_code=trust_remote_code, **data.or_written())
    write_whole(path, modifier.table.save)
    say(f"{path}: {len(modifier.table.rows)} linears at {len(modifier.options)} options")
