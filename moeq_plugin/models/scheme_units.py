"""Scheme units: the linears that a program that reads the checkpoint holds in one scheme.

vLLM 0.32 and 0.33 read the scheme of expert 0 and use it for the whole MoE layer; they fuse q, k
and v, gate and up, and the two down projections of latent attention. GGUF keeps the experts of a
layer in one tensor per projection. Where linears are run one by one every expert is free, but its
gate and up projections multiply the same input and are kept together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

from torch import nn

from moeq_plugin.core.names import fused_with
from moeq_plugin.models.moe import MoELayer


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
    layer_of_expert = {
        name_of[module]: layer.name
        for layer in layers
        for index in range(layer.num_experts)
        for module in layer.expert(index).modules()
        if isinstance(module, nn.Linear)
    }
    known = set(names)
    labels: dict[str, list[str]] = {target.value: [] for target in Target}
    for name in names:
        fused = _fused(name, known)
        labels[Target.LINEAR].append(name)
        labels[Target.EXPERT].append(fused)
        layer_name = layer_of_expert.get(name)
        if layer_name is not None:
            projection = name.rpartition(".")[2]
            labels[Target.VLLM].append(f"{layer_name}.experts")
            labels[Target.GGUF].append(f"{layer_name}.experts.*.{projection}")
        else:
            labels[Target.VLLM].append(fused)
            labels[Target.GGUF].append(name)
    return {target: tuple(of_linears) for target, of_linears in labels.items()}


def _fused(name: str, known: set[str]) -> str:
    """Return one label for the linears that are there and become one matrix."""
    parent, dot, _ = name.rpartition(".")
    present = [part.rpartition(".")[2] for part in fused_with(name) if part in known]
    return f"{parent}{dot}{'+'.join(present)}"
