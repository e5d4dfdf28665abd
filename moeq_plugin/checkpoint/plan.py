"""What quantizing a model will give, to the byte, from its config and headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moeq_plugin.checkpoint.architecture import KEPT, Architecture, Linear
from moeq_plugin.checkpoint.checks.findings import UNREADABLE, Finding
from moeq_plugin.checkpoint.checks.readers import check_transformers, check_vllm
from moeq_plugin.checkpoint.checks.structure import check_structure
from moeq_plugin.checkpoint.checks.tensor_parallel import check_parallel
from moeq_plugin.checkpoint.formats import tensors_of
from moeq_plugin.checkpoint.headers import BITS, header_bytes
from moeq_plugin.checkpoint.layout import Layout, lay_out
from moeq_plugin.checkpoint.lookup import Lookup
from moeq_plugin.checkpoint.open_checkpoint import open_checkpoint
from moeq_plugin.checkpoint.reader_names import in_file
from moeq_plugin.checkpoint.schemes import Group, Scheme, Schemes
from moeq_plugin.core.names import canonical, layer_of

_ONE_FILE = 50_000_000_000  # bytes of tensors that save_pretrained writes into one file
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ALWAYS_FLOAT32 = "e_score_correction_bias"  # transformers keeps it so, whatever the model's dtype


@dataclass(frozen=True)
class Output:
    """A tensor of the checkpoint to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of its data."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


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
    file_bytes: int | None
    warnings: tuple[Finding, ...]


def plan_quantization(path: str | Path, scheme: Scheme, *, tp: int = 1) -> Plan:
    """Plan to quantize all linears but routers, shared-expert gates and the output embedding.

    Args:
        path: directory of the 16-bit model.
        scheme: for the quantized linears.
        tp: ranks of tensor parallelism to check for.

    Raises:
        ValueError: if there is no such model, a file is damaged or it is quantized already.
    """
    if tp < 1:
        raise ValueError(f"tp must be at least 1, got {tp}")
    layout = lay_out(open_checkpoint(path))
    _check_source(layout, path)
    architecture = layout.architecture
    linears = [linear for linear in architecture.linears.values() if not linear.is_mtp]
    wanted = [linear for linear in linears if linear.role not in KEPT]
    size = scheme.group_size or 1
    targeted = [linear for linear in wanted if linear.shape[1] % size == 0]
    outputs = list(_outputs(layout, {linear.name for linear in targeted}, scheme))
    tensor_bytes = sum(output.num_bytes for output in outputs)
    is_one_file = tensor_bytes <= _ONE_FILE
    header = header_bytes((o.name, o.dtype, o.shape) for o in outputs) if is_one_file else 0
    num_quantized = sum(math.prod(linear.shape) for linear in targeted)
    num_parameters = sum(
        math.prod(t.shape) for n, t in layout.checkpoint.tensors.items() if _is_loaded(layout, n)
    )
    return Plan(
        architecture=architecture,
        quantized=tuple(linear.name for linear in targeted),
        kept={linear.name: linear.role.value for linear in linears if linear.role in KEPT},
        misfits=tuple(linear.name for linear in wanted if linear.shape[1] % size),
        quantized_frac=num_quantized / num_parameters,
        source_bytes=sum(tensor.num_bytes for tensor in layout.checkpoint.tensors.values()),
        tensor_bytes=tensor_bytes,
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


def _is_loaded(layout: Layout, name: str) -> bool:
    """Tell whether transformers loads a tensor: not those for next-token prediction."""
    layer = layer_of(name)
    return layer is None or layer < layout.architecture.num_layers


def _outputs(layout: Layout, targeted: set[str], scheme: Scheme) -> Iterator[Output]:
    architecture = layout.architecture
    family = architecture.family
    declared = layout.checkpoint.config.get("dtype", layout.checkpoint.config.get("torch_dtype"))
    dtype = _DTYPES.get(declared) if isinstance(declared, str) else None
    seen = set()
    for name, tensor in layout.checkpoint.tensors.items():
        module = canonical(name).removesuffix(".weight")
        if not _is_loaded(layout, name) or module in architecture.linears or _is_fused(name):
            continue
        seen.add(canonical(name))
        stored = "F32" if name.endswith(_ALWAYS_FLOAT32) else dtype or tensor.dtype
        yield Output(name, stored, tensor.shape)
    for linear in architecture.linears.values():
        if linear.is_mtp:
            continue
        found = layout.modules.get(linear.name, {}).get("weight")
        stored = dtype or (found.dtype if found else "BF16")
        name = in_file(linear.name, family)
        wanted = tensors_of(scheme if linear.name in targeted else None, linear.shape)
        if wanted is None:
            raise ValueError(f"the sizes of format {scheme.form!r} are not known here")
        for suffix, part in wanted.items():
            is_float = "BF16" in part.dtypes
            yield Output(f"{name}.{suffix}", stored if is_float else part.dtypes[0], part.shape)
        bias = f"{linear.name}.bias"
        if bias in architecture.others and bias not in seen:  # of fused experts
            yield Output(f"{name}.bias", stored, architecture.others[bias])


def _is_fused(name: str) -> bool:
    return name.endswith(tuple(f".experts.{stack}{tail}" for stack in _STACKS for tail in _TAILS))


_STACKS, _TAILS = ("gate_up_proj", "down_proj"), ("", "_bias")


def _warnings(layout: Layout, targeted: list[Linear], scheme: Scheme, tp: int) -> Iterator[Finding]:
    """Yield what readers would find in the checkpoint, as a verification of it would."""
    architecture = layout.architecture
    planned: dict[str, Scheme | None] = dict.fromkeys(layout.stored)
    planned |= {linear.name: scheme for linear in targeted}
    schemes = Schemes("compressed-tensors", (Group(("Linear",), scheme),))
    lookup = Lookup(schemes, architecture.family)
    future = replace(layout, schemes=schemes, lookup=lookup, stored=planned)
    yield from check_vllm(future, "vllm")
    yield from check_transformers(future, "vllm")
    yield from check_parallel(architecture, planned, tp)
