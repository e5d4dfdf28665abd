"""What quantizing a model will give, to the byte, from its config and headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moeq_plugin.checkpoint.architecture import KEPT, Architecture, Linear
from moeq_plugin.checkpoint.checks.findings import UNREADABLE, Finding, warning
from moeq_plugin.checkpoint.checks.readers import check_transformers, check_vllm
from moeq_plugin.checkpoint.checks.structure import check_structure
from moeq_plugin.checkpoint.checks.tensor_parallel import check_parallel
from moeq_plugin.checkpoint.codebooks import Codebooks
from moeq_plugin.checkpoint.headers import header_bytes
from moeq_plugin.checkpoint.layout import Build, Layout, lay_out
from moeq_plugin.checkpoint.lookup import Lookup
from moeq_plugin.checkpoint.open_checkpoint import open_checkpoint
from moeq_plugin.checkpoint.outputs import copied_tensors, loaded_shapes, outputs_of
from moeq_plugin.checkpoint.schemes import Group, Scheme, Schemes

_ONE_FILE = 50_000_000_000  # bytes of tensors that save_pretrained writes into one file


@dataclass(frozen=True)
class Plan:
    """What quantization will do and write.

    Attributes:
        architecture: the model.
        quantized: linears that get the scheme.
        kept: linears that stay in 16 bit by default, with the reason.
        misfits: linears whose columns the groups do not divide; quantization would refuse them.
        quantized_frac: share of all parameters that is quantized.
        source_bytes: of the model's tensors.
        tensor_bytes: of the tensors to be written.
        num_copied: how many of them are copied as they are, for next-token prediction.
        copied_bytes: of these.
        file_bytes: of the file that holds them, its header included; ``None`` if there are several.
        warnings: what servers will not do with it.
    """

    architecture: Architecture
    quantized: tuple[str, ...]
    kept: dict[str, str]
    misfits: tuple[str, ...]
    quantized_frac: float
    source_bytes: int
    tensor_bytes: int
    num_copied: int
    copied_bytes: int
    file_bytes: int | None
    warnings: tuple[Finding, ...]


def plan_quantization(
    path: str | Path, scheme: Scheme | Codebooks, *, tp: int = 1, build: Build | None = None
) -> Plan:
    """Plan to quantize all linears but routers, shared-expert gates and the output embedding.

    Args:
        path: directory of the 16-bit model.
        scheme: for the quantized linears.
        tp: ranks of tensor parallelism to check for.
        build: finds out what a model of a family that we do not know consists of; without it,
            that is read off the file.

    Raises:
        ValueError: if there is no such model, a file is damaged, it is quantized already or cannot
            be quantized.
    """
    if tp < 1:
        raise ValueError(f"tp must be at least 1, got {tp}")
    layout = lay_out(open_checkpoint(path))
    _check_source(layout, path)
    if build is not None and not layout.architecture.is_known:
        layout = lay_out(layout.checkpoint, build(layout.checkpoint))
    architecture = layout.architecture
    linears = [linear for linear in architecture.linears.values() if not linear.is_mtp]
    wanted = [linear for linear in linears if linear.role not in KEPT]
    # of the input columns: what shares a scale, or an index
    size = scheme.vector_dim if isinstance(scheme, Codebooks) else scheme.group_size or 1
    targeted = [linear for linear in wanted if linear.shape[1] % size == 0]
    outputs = list(outputs_of(layout, {linear.name for linear in targeted}, scheme))
    copied = copied_tensors(layout)
    tensor_bytes = sum(output.num_bytes for output in (*outputs, *copied))
    is_one_file = tensor_bytes <= _ONE_FILE and not copied
    header = header_bytes((o.name, o.dtype, o.shape) for o in outputs) if is_one_file else 0
    num_quantized = sum(math.prod(linear.shape) for linear in targeted)
    num_parameters = sum(map(math.prod, loaded_shapes(layout)))
    return Plan(
        architecture=architecture,
        quantized=tuple(linear.name for linear in targeted),
        kept={linear.name: linear.role.value for linear in linears if linear.role in KEPT},
        misfits=tuple(linear.name for linear in wanted if linear.shape[1] % size),
        quantized_frac=num_quantized / num_parameters,
        source_bytes=sum(tensor.num_bytes for tensor in layout.checkpoint.tensors.values()),
        tensor_bytes=tensor_bytes,
        num_copied=len(copied),
        copied_bytes=sum(output.num_bytes for output in copied),
        file_bytes=tensor_bytes + header if is_one_file else None,
        warnings=tuple(_warnings(layout, targeted, scheme, tp)),
    )


def _check_source(layout: Layout, path: str | Path) -> None:
    broken = [f"{f.where}: {f.what}" for f in layout.checkpoint.problems if f.check in UNREADABLE]
    if broken:
        raise ValueError(f"{path}: {'; '.join(broken)}")
    if layout.schemes.dialect:
        raise ValueError(f"{path} is quantized already; plan from the 16-bit model")
    missing = [f for f in check_structure(layout) if f.check.startswith("missing")]
    if missing:
        raise ValueError(
            f"{path}: {missing[0].where}: {missing[0].what}, and {len(missing)} in all"
        )


def _warnings(
    layout: Layout, targeted: list[Linear], scheme: Scheme | Codebooks, tp: int
) -> Iterator[Finding]:
    """Yield what readers would find in the checkpoint, as a verification of it would."""
    architecture = layout.architecture
    if isinstance(scheme, Codebooks):
        what = f"no server reads codebooks ({scheme.describe()})"
        way_out = "import moeq_plugin.integrations.hf, and load it with transformers"
        yield warning("vllm-refuses", "config.json", what, way_out)
        return
    planned: dict[str, Scheme | None] = dict.fromkeys(layout.stored)
    planned |= {linear.name: scheme for linear in targeted}
    schemes = Schemes("compressed-tensors", (Group(("Linear",), scheme),))
    lookup = Lookup(schemes, architecture.family)
    future = replace(layout, schemes=schemes, lookup=lookup, stored=planned)
    yield from check_vllm(future, "vllm")
    yield from check_transformers(future, "vllm")
    yield from check_parallel(architecture, planned, tp)
