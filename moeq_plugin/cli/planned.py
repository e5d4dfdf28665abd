"""What is said of a plan: lines for people, JSON types for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeq_plugin.core.dense_words import layers_without_experts

if TYPE_CHECKING:
    from moeq_plugin.checkpoint.plan import Plan
    from moeq_plugin.cli.probe import Prediction
    from moeq_plugin.core.allocation import Allocation
    from moeq_plugin.core.sensitivity import SensitivityTable


def plan_lines(found: Plan, scheme: str, model: Path) -> Iterator[str]:
    """Yield what quantization will do and write, and what servers will not do with it.

    Args:
        found: the plan.
        scheme: of the quantized linears, as the request spelled it.
        model: directory of the 16-bit model.
    """
    from moeq_plugin.checkpoint.presets import scheme_named
    from moeq_plugin.checkpoint.schemes import Scheme

    arch, parsed = found.architecture, scheme_named(scheme)
    experts = (
        f"{arch.num_layers} layers, {len(arch.moe_layers)} with {arch.num_experts} experts, "
        f"{arch.top_k} per token, {arch.num_shared} shared"
        if arch.moe_layers
        else layers_without_experts(arch.family, arch.num_layers)
    )
    yield f"{arch.family}: {experts}"
    roles = Counter(found.kept.values())
    yield (
        f"quantized: {len(found.quantized)} linears, {found.quantized_frac:.1%} of all parameters, "
        f"to {parsed.describe()}; in 16 bit: "
        + (", ".join(f"{count} x {role}" for role, count in roles.items()) or "no linear")
    )
    file = "several files" if found.file_bytes is None else f"a file of {found.file_bytes} bytes"
    yield f"{found.source_bytes} bytes of tensors become {found.tensor_bytes}, {file}"
    yield _in_short(found, model)
    if found.num_copied:
        yield (
            f"next-token prediction: {found.num_copied} tensors of {found.copied_bytes} bytes "
            "among them, copied as they are: transformers does not load them, servers draft "
            "with them"
        )
    if found.misfits:
        some = ", ".join(found.misfits[:3])
        if isinstance(parsed, Scheme):
            what = f"groups of {parsed.group_size}"
            use = f"another group size, such as {scheme}_G32"
        else:
            what, use = f"vectors of {parsed.vector_dim}", "codebooks of other vectors"
        yield (
            f"refused: {what} do not divide the columns of {len(found.misfits)} linears ({some}): "
            f"use {use}, or `ignore` them"
        )
    for warning in found.warnings:
        yield f"warning: {warning.where}: {warning.what}; {warning.way_out}"


def plan_dict(
    found: Plan, scheme: str, model: Path, predicted: Prediction | None
) -> dict[str, Any]:
    """Return the same in JSON types, with every linear by name.

    Args:
        found: the plan.
        scheme: of the quantized linears, as the request spelled it.
        model: directory of the 16-bit model.
        predicted: what a run on a few layers predicts, where there was one.
    """
    arch = found.architecture
    return {
        "schema_version": 1,
        "scheme": scheme,
        "family": arch.family,
        "num_layers": arch.num_layers,
        "num_moe_layers": len(arch.moe_layers),
        "num_experts": arch.num_experts,
        "top_k": arch.top_k,
        "num_shared": arch.num_shared,
        **{name: value for name, value in vars(found).items() if name != "architecture"},
        "cache_bytes_per_token": _cache_bytes(model),
        "warnings": [asdict(warning) for warning in found.warnings],
        "probe": None if predicted is None else asdict(predicted),
    }


def _in_short(found: Plan, model: Path) -> str:
    """Return sizes in the units that people buy memory in, with what serving takes."""
    from moeq_plugin.report.section import size

    cache = _cache_bytes(model)
    of_cache = "" if cache is None else f" and {size(1000 * cache)} for 1,000 tokens of context"
    return (
        f"{size(found.source_bytes)} become {size(found.tensor_bytes)}; a server needs "
        f"{size(found.tensor_bytes)} for the weights{of_cache}"
    )


def _cache_bytes(model: Path) -> int | None:
    from moeq_plugin.checkpoint.serving_memory import cache_bytes_per_token
    from moeq_plugin.untrusted.reading import read_json

    return cache_bytes_per_token(read_json(model / "config.json"))


def prediction_line(found: Prediction) -> str:
    """Return what a run on a few layers predicts of the whole."""
    return (
        f"probe of {found.num_layers} layers on {found.num_sequences} sequences: quantizing takes "
        f"{found.cpu_seconds:.0f} s of CPU time, {found.seconds:.0f} s as busy as the machine is "
        f"now, and {found.peak_bytes / 2**20:.0f} MiB of memory"
    )


def allocation_line(found: Allocation, table: SensitivityTable) -> str:
    """Return what a budget gives."""
    of = allocation_dict(found, table)
    chosen = ", ".join(f"{count} {option}" for option, count in of["num_linears"].items())
    return (
        f"{found.bits_per_weight:.4f} bits per weight, {of['tensor_bytes'] / 1e9:.4g} GB: "
        f"predicted loss {found.value:.4g}; {chosen}"
    )


def allocation_dict(found: Allocation, table: SensitivityTable) -> dict[str, Any]:
    """Return what a budget gives in JSON types: size, predicted loss, linears of each scheme."""
    counts = Counter(found.choice.values())
    return {
        "bits_per_weight": found.bits_per_weight,
        "tensor_bytes": found.num_bytes + table.fixed_bytes,
        "predicted_loss": found.value,
        "num_linears": {option: counts[option] for option in table.options if option in counts},
    }
