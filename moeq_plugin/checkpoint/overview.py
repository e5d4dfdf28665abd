"""What a model is, from its config and the headers of its files: no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moeq_plugin.checkpoint.architecture import KEPT, Architecture, Role
from moeq_plugin.checkpoint.checks.findings import Finding
from moeq_plugin.checkpoint.checks.mixed_schemes import check_mixed_schemes
from moeq_plugin.checkpoint.checks.readers import check_transformers, check_vllm
from moeq_plugin.checkpoint.config import Config
from moeq_plugin.checkpoint.families import FAMILIES, architecture_of
from moeq_plugin.checkpoint.layout import Build, Layout, lay_out
from moeq_plugin.checkpoint.lookup import Lookup
from moeq_plugin.checkpoint.open_checkpoint import Checkpoint, open_checkpoint
from moeq_plugin.checkpoint.read_schemes import read_schemes
from moeq_plugin.checkpoint.reader_names import split_tensor
from moeq_plugin.checkpoint.schemes import Scheme, Schemes, describe
from moeq_plugin.core.names import canonical, layer_of
from moeq_plugin.untrusted.reading import read_json

ONLY_OURS = ("rwkv6", "rwkv7")  # families that nobody reads without us
_RWKV_READERS = {
    "vllm": ("has no such model",),
    "transformers": ("only after `import moeq_plugin.integrations.hf`",),
    "gguf": ("nothing here writes it",),
}
_UNKNOWN = "whether it has this architecture is not known here"
_TO_16_BIT = (
    "its converter would at best turn these codes back into 16 bit: convert the 16-bit model, and "
    "quantize with `moeq imatrix` and `moeq tensor-types`"
)
# names of linears and the family; raises a ValueError where llama.cpp has no names
NameForLlama = Callable[[Sequence[str], str], object]


@dataclass(frozen=True)
class Overview:
    """A model at a glance.

    Attributes:
        family: the config's model type.
        is_known: whether its structure is known here, and not read off the file.
        num_layers: decoder layers.
        num_moe_layers: of which have experts.
        num_experts: routed experts of each.
        top_k: of which each token uses.
        num_shared: shared experts.
        experts: ``fused`` in one tensor per layer, ``separate``, ``unknown`` from a config, or
            ``not counted`` where tensors hold them in a form that nobody here takes apart.
        num_parameters: in all; 0 if they are not known.
        num_active: of which one token uses; 0 if they are not known.
        layers: for each layer, its schemes and how many linears have them.
        readers: for each reader, what it cannot do with the model; empty if it reads it.
        is_built: whether it was built to find out what it consists of.
        refusal: why it cannot be quantized; empty if nothing is known against it.
    """

    family: str
    is_known: bool
    num_layers: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    num_shared: int
    experts: str
    num_parameters: int
    num_active: int
    layers: dict[int, dict[str, int]]
    readers: dict[str, list[str]]
    is_built: bool = False
    refusal: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the overview in JSON types."""
        return {"schema_version": 1, **asdict(self)}


def inspect_model(
    path: str | Path, build: Build | None = None, name_for_llama: NameForLlama | None = None
) -> Overview:
    """Describe a checkpoint or a ``config.json``.

    Args:
        path: of either.
        build: finds out what a 16-bit model of a family that we do not know consists of; without
            it, or where it refuses the model, that is read off the file.
        name_for_llama: asks llama.cpp for its names of the linears that it would quantize; without
            it nothing is said about whether it has any.

    Raises:
        ValueError: if there is neither, or the config cannot be one.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        return _of_config(read_json(path), path, name_for_llama)
    if path.is_dir() and not any(path.glob("*.safetensors")):
        return _of_config(read_json(path / "config.json"), path, name_for_llama)
    layout, refusal = lay_out(open_checkpoint(path)), ""
    if build is not None and not layout.architecture.is_known and not layout.schemes.dialect:
        try:
            layout = lay_out(layout.checkpoint, build(layout.checkpoint))
        except ValueError as error:
            refusal = str(error)
    fused = [layer for layer in layout.architecture.moe_layers if layout.is_fused(layer)]
    found = _overview(layout, "fused" if fused else "separate", name_for_llama)
    if not refusal:
        return found
    readers = {reader: [*limits, _UNKNOWN] for reader, limits in found.readers.items()}
    return replace(found, readers=readers, refusal=refusal)


def _of_config(
    content: dict[str, Any], path: Path, name_for_llama: NameForLlama | None
) -> Overview:
    """Describe a model of a known family as its config says that it is stored.

    Raises:
        ValueError: if the family is not known.
    """
    config = Config(content)
    if config.family not in FAMILIES or config.is_part:
        raise ValueError(
            f"{path}: {config.family} is not one of {', '.join(FAMILIES)}; give a directory with "
            "safetensors files, whose headers say the rest"
        )
    architecture, schemes = architecture_of(config), read_schemes(content)
    lookup = Lookup(schemes, config.family)
    stored = {
        linear.name: _declared(lookup, schemes, linear.role, linear.name, architecture)
        for linear in architecture.linears.values()
        if not linear.is_mtp
    }
    empty = Checkpoint(path.parent, content)
    layout = Layout(empty, architecture, schemes, lookup, {}, stored)
    return _overview(layout, "unknown", name_for_llama)


def _declared(
    lookup: Lookup, schemes: Schemes, role: Role, name: str, architecture: Architecture
) -> Scheme | None:
    is_quantized = bool(schemes.groups) and role is not Role.ROUTER
    return lookup.by_name(architecture.linears[name]) if is_quantized else None


def _overview(layout: Layout, experts: str, name_for_llama: NameForLlama | None) -> Overview:
    architecture = layout.architecture
    layers: dict[int, Counter[str]] = {}
    for linear in layout.present():
        if linear.layer is not None and linear.role not in KEPT:
            name = describe(layout.stored[linear.name])
            layers.setdefault(linear.layer, Counter())[name] += 1
    num_parameters = _num_parameters(layout)
    return Overview(
        family=architecture.family,
        is_known=architecture.is_known,
        num_layers=architecture.num_layers,
        num_moe_layers=len(architecture.moe_layers),
        num_experts=architecture.num_experts,
        top_k=architecture.top_k,
        num_shared=architecture.num_shared,
        experts=experts if architecture.moe_layers else _lone_experts(layout),
        num_parameters=num_parameters,
        num_active=num_parameters - _num_idle(architecture),
        layers={layer: dict(layers[layer]) for layer in sorted(layers)},
        readers=_readers(layout, name_for_llama),
        is_built=architecture.saved is not None,
    )


def _lone_experts(layout: Layout) -> str:
    return "not counted" if layout.stacked else "none"


def _num_idle(architecture: Architecture) -> int:
    """Count the parameters of routed experts that a token does not use."""
    routed = (e for of in architecture.experts().values() for e in of if not e.is_mtp)
    total = sum(math.prod(expert.shape) for expert in routed)
    return total - total * architecture.top_k // max(1, architecture.num_experts)


def _num_parameters(layout: Layout) -> int:
    """Count what transformers loads: not the layers for next-token prediction."""
    architecture = layout.architecture
    if architecture.saved is not None:
        return sum(math.prod(shape) for _, shape in architecture.saved.tensors.values())
    others = architecture.others or {  # of a family that we do not know: what the file holds
        name: tensor.shape
        for name, tensor in layout.checkpoint.tensors.items()
        if split_tensor(canonical(name))[0] not in architecture.linears
    }
    linears = architecture.linears.values()
    return sum(math.prod(linear.shape) for linear in linears if not linear.is_mtp) + sum(
        math.prod(shape)
        for name, shape in others.items()
        if (layer_of(name) or 0) < architecture.num_layers
    )


def _readers(layout: Layout, name_for_llama: NameForLlama | None) -> dict[str, list[str]]:
    """Return what each reader cannot do; the same checks as those of a verification."""
    if layout.architecture.family in ONLY_OURS:
        return {reader: list(limits) for reader, limits in _RWKV_READERS.items()}
    found: dict[str, list[Finding]] = {
        "vllm": [*check_mixed_schemes(layout, "vllm"), *check_vllm(layout, "vllm")],
        "transformers": list(check_transformers(layout, "transformers")),
        "gguf": list(check_mixed_schemes(layout, "gguf")),
    }
    said = {reader: [f"{f.where}: {f.what}" for f in of] for reader, of in found.items()}
    said["gguf"] += _limits_of_llama(layout, name_for_llama)
    return said


def _limits_of_llama(layout: Layout, name_for_llama: NameForLlama | None) -> list[str]:
    """Return why llama.cpp's converter would not make of the checkpoint what one would want."""
    if any(layout.stored.values()):
        return [_TO_16_BIT]
    if name_for_llama is None:
        return []
    architecture = layout.architecture
    linears = [
        linear.name
        for linear in architecture.linears.values()
        if linear.layer is not None and linear.role not in KEPT and not linear.is_mtp
    ]
    try:
        name_for_llama(linears, architecture.family)
    except ValueError as error:
        return [str(error)]
    return []
