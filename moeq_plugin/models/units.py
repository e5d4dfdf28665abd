"""Which linears a program that reads the checkpoint will hold in one scheme.

vLLM 0.32 and 0.33 read the scheme of expert 0 and use it for the whole MoE layer; they fuse q, k
and v, gate and up, and the two down projections of latent attention. GGUF keeps the experts of a
layer in one tensor per projection. Where linears are run one by one every expert is free, but its
gate and up projections multiply the same input and are kept together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from torch import nn

from moeq_plugin.models.moe import MoELayer

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_LATENT = ("q_a_proj", "kv_a_proj_with_mqa")


class Target(StrEnum):
    """What will read the checkpoint, as far as it limits which weights may differ in scheme."""

    VLLM = "vllm"
    GGUF = "gguf"
    EXPERT = "expert"
    LINEAR = "linear"


def unit_labels(
    names: Sequence[str], layers: Iterable[MoELayer], modules: Mapping[str, nn.Module]
) -> dict[str, tuple[str, ...]]:
    """Return for each target the label of each linear; linears of one label get one scheme.

    Args:
        names: of the linears.
        layers: the MoE layers, linearized.
        modules: all modules of the model by name.

    Example:
        >>> names = ["a.q_proj", "a.v_proj", "a.o_proj"]
        >>> unit_labels(names, [], {})["vllm"]
        ('a.q_proj+v_proj', 'a.q_proj+v_proj', 'a.o_proj')
    """
    name_of = {module: name for name, module in modules.items()}
    seats = {
        f"{name_of[module]}": (layer.name, index)
        for layer in layers
        for index in range(layer.num_experts)
        for module in layer.expert(index).modules()
        if isinstance(module, nn.Linear)
    }
    known = set(names)
    labels: dict[str, list[str]] = {target.value: [] for target in Target}
    for name in names:
        parent, _, projection = name.rpartition(".")
        fused = _fused(parent, projection, known)
        labels[Target.LINEAR].append(name)
        if name in seats:
            layer_name = seats[name][0]
            labels[Target.VLLM].append(f"{layer_name}.experts")
            labels[Target.GGUF].append(f"{layer_name}.experts.*.{projection}")
            labels[Target.EXPERT].append(fused)
        else:
            labels[Target.VLLM].append(fused)
            labels[Target.GGUF].append(name)
            labels[Target.EXPERT].append(fused)
    return {target: tuple(of_rows) for target, of_rows in labels.items()}


def pool_of(name: str) -> str:
    """Return the name without the number of an expert: linears with one role in one layer."""
    return re.sub(r"(\.experts)\.\d+\.", r"\1.*.", name)


def _fused(parent: str, projection: str, known: set[str]) -> str:
    for together in (*_FUSED, _LATENT):
        present = [p for p in together if f"{parent}.{p}" in known]
        if projection in present and len(present) > 1:
            return f"{parent}.{'+'.join(present)}"
    return f"{parent}.{projection}"
