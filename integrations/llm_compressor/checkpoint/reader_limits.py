"""What other programs cannot read of a checkpoint, known before it is written.

Each function returns sentences for the log, the run record and the model card. Versions are those
on which the behaviour was seen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from compressed_tensors.quantization import QuantizationStrategy, QuantizationType
from torch import nn

from moeq_plugin.core.names import fused_with, role_of
from moeq_plugin.integrations.llm_compressor.schemes import weight_args
from moeq_plugin.models.expert_reading import Grid, misread_experts
from moeq_plugin.models.moe import MoELayer

UNCOMPRESSED = (
    "save_compressed=False writes plain weights with scales beside them, which neither vLLM nor "
    "transformers reads for a model with experts. Leave it out."
)
_WAY_OUT = "moeq_plugin.integrations.llm_compressor.load_dequantized(directory) reads it as it is."


def reload_limits(
    layers: list[MoELayer],
    names: Mapping[str, str],
    others: Iterable[nn.Module] = (),
    loader: str = "AutoModelForCausalLM",
) -> list[str]:
    """Return why plain transformers would misread the experts, one sentence per reason.

    Args:
        layers: the MoE layers with their schemes attached.
        names: by the rule that transformers reads this architecture's experts by, what files call
            their projections; empty without a rule.
        others: modules outside of the layers.
        loader: the class that loads such a model.
    """
    linears = [linear for layer in layers for linear in expert_linears(layer)]
    schemes = {_scheme_key(linear) for linear in linears}
    if schemes <= {None} and not (linears and any(weight_args(module) for module in others)):
        return []
    reader = f"{loader}.from_pretrained (transformers 5.17)"
    limits = list(misread_experts({_grid(linear) for linear in linears}, names, set(), reader))
    if len(schemes) > 1:
        limits.append(
            f"the experts do not all have one scheme; {reader} applies one to all of them and "
            "loads the others silently wrong"
        )
    return [f"{limit}. {_WAY_OUT}" for limit in limits]


def budget_limit(layers: list[MoELayer], options: Collection[str]) -> str:
    """Return what plain transformers would misread of a budget's choice, before it is measured.

    Args:
        layers: the MoE layers.
        options: names of the schemes to choose from.
    """
    if not layers or len(options) < 2:
        return ""
    return (
        f"a budget may give the experts of some layers {' and of others '.join(options)}: plain "
        "from_pretrained of transformers 5.17 applies one scheme to all of them and loads the "
        f"others silently wrong. {_WAY_OUT}"
    )


def serving_limits(layers: list[MoELayer]) -> list[str]:
    """Return why vLLM (0.32, 0.33) would misread a MoE layer, one sentence per layer."""
    limits = []
    for layer in layers:
        schemes = {_scheme_key(linear) for linear in expert_linears(layer)}
        if len(schemes) > 1:
            limits.append(
                f"{layer.name}: the experts have {len(schemes)} schemes; vLLM applies that of "
                "expert 0 to all of them, silently. Give all experts of a layer one scheme."
            )
    return limits


def fusion_limits(linears: Mapping[str, nn.Module]) -> list[str]:
    """Return why vLLM (0.32, 0.33) would refuse or misread what it loads as one matrix.

    Args:
        linears: the linears by name, schemes attached, but for those of routed experts.
    """
    split: dict[str, list[str]] = {}
    for name in linears:
        parts = [part for part in fused_with(name) if part in linears]
        if parts[0] == name and len({_scheme_key(linears[part]) for part in parts}) > 1:
            split.setdefault(", ".join(role_of(part) for part in parts), []).append(name)
    return [
        f"{together} do not have one scheme in {len(names)} layers; vLLM loads them as one matrix "
        "and reads one scheme for it. Give them one scheme."
        for together, names in split.items()
    ]


def storage_limits(linears: Iterable[nn.Module]) -> list[str]:
    """Return why saving may not keep the codes that were chosen.

    The host keeps dequantized weights and derives codes from them when it saves. A bfloat16
    weight is off by up to 2^-8 of itself, half a step or more from 128 steps on, which only
    asymmetric 8-bit codes reach.

    Args:
        linears: the linears, schemes attached.
    """
    args = [(linear, weight_args(linear)) for linear in linears]
    coarse = [
        linear
        for linear, a in args
        if a and a.num_bits == 8 and not a.symmetric and linear.weight.dtype == torch.bfloat16
    ]
    if not coarse:
        return []
    return [
        f"{len(coarse)} linears have 8-bit asymmetric weights in bfloat16: saving may move a code "
        "by one. Use symmetric 8-bit weights, or load the model in float32."
    ]


def expert_linears(layer: MoELayer) -> list[nn.Linear]:
    """Return the linears of all routed experts of a linearized layer."""
    return [
        module
        for index in range(layer.num_experts)
        for module in layer.expert(index).modules()
        if isinstance(module, nn.Linear)
    ]


def _scheme_key(linear: nn.Module) -> str | None:
    args = weight_args(linear)
    return args.model_dump_json() if args is not None else None


def _grid(linear: nn.Module) -> Grid | None:
    args = weight_args(linear)
    if args is None:
        return None
    scheme = getattr(linear, "quantization_scheme", None)
    return Grid(
        num_bits=args.num_bits,
        is_float=args.type == QuantizationType.FLOAT,
        symmetric=args.symmetric,
        has_second_scale=args.strategy == QuantizationStrategy.TENSOR_GROUP,
        has_groups=args.strategy == QuantizationStrategy.GROUP,
        is_packed=scheme is not None and scheme.input_activations is None,
    )
