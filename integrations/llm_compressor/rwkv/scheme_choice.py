"""Score the weights of a model, and write down which scheme each linear gets."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    is_preset_scheme,
    preset_name_to_scheme,
)
from torch import nn

from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.core.names import fused_with
from moeq_plugin.core.uniformity import Gaps, UniformityScore, score_uniformity
from moeq_plugin.integrations.llm_compressor.checkpoint.reader_limits import expert_linears
from moeq_plugin.integrations.llm_compressor.moequant.request import Request
from moeq_plugin.integrations.llm_compressor.schemes import weight_args
from moeq_plugin.models.moe import MoELayer
from moeq_plugin.models.packed import packed_modules

W3_GROUP_64 = {"num_bits": 3, "symmetric": False, "group_size": 64}  # the paper's scalar grid


@dataclass(frozen=True)
class FormatChoice:
    """Which weights get a grid and which a codebook.

    Attributes:
        request: with the schemes of those on grids.
        codebooks: the format of each other, by name.
        uniformity: what was decided by, as the record says it; empty if it was measured.
    """

    request: Request
    codebooks: Mapping[str, CodebookFormat]
    uniformity: Mapping[str, dict[str, Any]]


def score_weights(linears: Mapping[str, nn.Linear], gaps: Gaps) -> dict[str, UniformityScore]:
    """Return the uniformity of every weight, all of which are finite."""
    return {name: score_uniformity(linear.weight, gaps) for name, linear in linears.items()}


def deciding_together(
    linears: Mapping[str, nn.Linear], layers: Iterable[MoELayer]
) -> list[list[str]]:
    """Return names of linears that a server can only load with one scheme.

    These are the routed experts of one layer, and elsewhere what is fused into one matrix: q, k
    and v, gate and up, and the two down projections of latent attention.
    """
    names = {linear: name for name, linear in linears.items()}
    groups = [[names[e] for e in expert_linears(layer) if e in names] for layer in layers]
    taken = {name for group in groups for name in group}  # gate and up of an expert among them
    fused: dict[tuple[str, ...], list[str]] = {}
    for name in linears:
        if name not in taken:
            fused.setdefault(fused_with(name), []).append(name)
    return groups + [group for group in fused.values() if len(group) > 1]


def default_scheme(targets: str | list[str]) -> QuantizationScheme:
    """Return the default grid for these targets, not yet narrowed to fit any weight."""
    targets = [targets] if isinstance(targets, str) else targets
    return QuantizationScheme(targets=targets, weights=weights_of_scheme(W3_GROUP_64))


def with_default_scheme(
    request: Request, linears: Mapping[str, nn.Linear], scalar: Collection[str]
) -> Request:
    """Return the request with the default grid for the linears that stay scalar."""
    plain = {name: linear for name, linear in linears.items() if name in scalar}
    groups = scheme_groups(plain, weights_of_scheme(W3_GROUP_64), "scalar")
    return request.with_groups(groups) if groups else request


def with_finer_scheme(
    request: Request, linears: Mapping[str, nn.Linear], scheme: str | dict[str, Any]
) -> Request:
    """Return the request with another grid for linears that would get a codebook."""
    finer = scheme_groups(linears, weights_of_scheme(scheme), "finer")
    # the host looks for names before classes, so that these take the finer scheme
    return request.with_groups({**request.groups(), **finer})


def check_vectors(linears: Mapping[str, nn.Linear], form: CodebookFormat) -> None:
    """Refuse a codebook whose vectors do not divide the columns of a linear.

    Raises:
        ValueError: naming the linears.
    """
    dim = form.vector_dim
    wrong = [name for name, linear in linears.items() if linear.in_features % dim]
    if wrong:
        raise ValueError(
            f"codebook.vector_dim {dim} must divide the input columns of every weight, which "
            f"it does not for {', '.join(wrong)}; use 1, or put them into `ignore`"
        )


def scheme_groups(
    linears: Mapping[str, nn.Linear], weights: QuantizationArgs, label: str
) -> dict[str, QuantizationScheme]:
    """Return schemes that target linears by name, with groups narrowed to fit their columns.

    Low-rank factors can have fewer columns than a group; they get the largest power of two that
    divides, and a scale per row where even 8 does not.

    Args:
        linears: by name.
        weights: the scheme of the weights.
        label: how the names of the groups begin.
    """
    by_size: dict[int | None, list[str]] = {}
    for name, linear in linears.items():
        size = weights.group_size
        while size and size > 0 and linear.in_features % size:
            size = size // 2 if size > 8 else None
        by_size.setdefault(size, []).append(name)
    groups = {}
    for size, names in by_size.items():
        fitted = weights.model_dump() | {"group_size": size}
        if size is None and weights.group_size:  # a scale per row is another strategy of the host
            fitted["strategy"] = "channel"
        name = f"{label}_{size or 'row'}"
        groups[name] = QuantizationScheme(targets=names, weights=QuantizationArgs(**fitted))
    return groups


def weights_of_scheme(scheme: str | dict[str, Any]) -> QuantizationArgs:
    """Return the weight arguments of a preset's name or of a mapping of their fields.

    Raises:
        ValueError: if there is no such scheme or it quantizes activations.
    """
    if isinstance(scheme, dict):
        fields = {"type": "int", "strategy": "group" if scheme.get("group_size") else "channel"}
        return QuantizationArgs(**{**fields, **scheme})
    if not is_preset_scheme(scheme):
        raise ValueError(f"{scheme!r} is not a scheme; give a preset or fields of its weights")
    preset = preset_name_to_scheme(scheme, [])
    if preset.weights is None or preset.input_activations is not None:
        raise ValueError(f"{scheme!r} has to be a scheme that quantizes weights alone")
    return preset.weights


def scalar_bits(linear: nn.Linear, weights: QuantizationArgs) -> int:
    """Return the bits that a linear's codes, scales and zero points take in a packed checkpoint."""
    rows, columns = linear.weight.shape
    groups = columns // weights.group_size if (weights.group_size or 0) > 0 else 1
    bits = rows * _words(columns * weights.num_bits)
    bits += rows * groups * linear.weight.element_size() * 8
    if not weights.symmetric:
        bits += groups * _words(rows * weights.num_bits)
    return bits


def stored_bits_per_weight(model: nn.Module) -> float:
    """Return the bits per quantized weight, with all codebooks, scales and zero points.

    Args:
        model: its encoded modules packed, the others with their schemes.
    """
    packed = packed_modules(model).values()
    bits = sum(32 * module.packed.numel() for module in packed)
    weights = sum(module.weight_shape.numel() for module in packed)
    for module in model.modules():
        args = weight_args(module)
        if args is not None and isinstance(module, nn.Linear):
            bits += scalar_bits(module, args)
            weights += module.weight.numel()
    return bits / max(1, weights)


def _words(bits: int) -> int:
    """Return ``bits`` rounded up to whole int32 words, as compressed-tensors packs a row."""
    return -(-bits // 32) * 32
