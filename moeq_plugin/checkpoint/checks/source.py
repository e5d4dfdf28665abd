"""How far is every weight from the 16-bit model that the checkpoint was quantized from?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from moeq_plugin.checkpoint.architecture import Linear, Role
from moeq_plugin.checkpoint.checks.findings import Finding, error, warning
from moeq_plugin.checkpoint.checks.values import is_readable
from moeq_plugin.checkpoint.codes import blocks, read_rows, read_tensor
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.checkpoint.reader_names import in_file
from moeq_plugin.core.names import canonical

# Relative errors that no sound quantizer reaches; another matrix is at 1.4. GPTQ moves weights far
# where inputs hardly vary: an expert of a trained model was met at 0.72 with 3 bits.
_LIMIT = {1: 1.2, 2: 1.2, 3: 1.1, 4: 0.8}
_LIMIT_ABOVE, _LIMIT_16_BIT = 0.4, 0.02
_NOT_COMPARABLE = 0.5  # of the linears beyond their limit
# Modifiers of llm-compressor and ours after which a model computes the same with other weights.
_REWRITE_WEIGHTS = {
    "AWQModifier",
    "MoEQuantAWQModifier",
    "SmoothQuantModifier",
    "ResidualRotationModifier",
    "SpinQuantModifier",
    "QuIPModifier",
}


def check_source(layout: Layout, source: Layout) -> Iterator[Finding]:
    """Yield weights that are further from the source's than quantization explains.

    Args:
        layout: the checkpoint.
        source: the 16-bit model, experts fused or not.
    """
    rewritten = _modifiers(layout.checkpoint.directory) & _REWRITE_WEIGHTS
    if rewritten:
        yield warning(
            "not-comparable",
            "linears",
            f"{', '.join(sorted(rewritten))} changed the weights before they were quantized "
            "(recipe.yaml), so nothing was compared with the source",
            "compare what the two compute: moeq eval SOURCE CHECKPOINT --text FILE",
        )
        return
    errors = {linear.name: e for linear, e in relative_errors(layout, source)}
    linears = [layout.architecture.linears[name] for name in errors]
    far = [linear for linear in linears if not errors[linear.name] <= _limit(layout, linear)]
    absent = [linear for linear in layout.present() if linear.name not in errors]
    for linear in absent:
        if is_readable(layout, linear) and not linear.is_mtp:
            yield error("not-comparable", linear.name, "the source has no weight of this shape")
    if len(far) > _NOT_COMPARABLE * len(errors):
        yield error("not-comparable", "linears", f"{len(far)} of {len(errors)} are far from it")
        return
    for linear in far:
        value, limit = errors[linear.name], _limit(layout, linear)
        where = in_file(linear.name, layout.architecture.family)
        what = f"relative error {value:.3g}, at most {limit} is to be expected"
        other = _nearest_expert(layout, source, linear) if linear.role is Role.EXPERT else None
        if other is not None and other != linear.expert:
            yield error("swapped-expert", where, f"{what}; it is expert {other} of the source")
        else:
            yield error("far-from-source", where, what)
    yield from _check_others(layout, source)


def _modifiers(directory: Path) -> set[str]:
    """Return the class names of the modifiers that made a checkpoint, where the host wrote them."""
    recipe = directory / "recipe.yaml"
    if not recipe.exists():
        return set()
    return set(re.findall(r"^\s*(\w+):", recipe.read_text(errors="replace"), re.M))


def relative_errors(layout: Layout, source: Layout) -> Iterator[tuple[Linear, float]]:
    """Yield each linear with ``|quantized - original| / |original|`` in the Frobenius norm."""
    for linear in layout.present():
        if is_readable(layout, linear):
            value = _relative_error(layout, source, linear, linear.expert)
            if value is not None:
                yield linear, value


def _relative_error(
    layout: Layout, source: Layout, linear: Linear, expert: int | None
) -> float | None:
    original = _original(source, linear, expert)
    if original is None or tuple(original.shape) != linear.shape:
        return None
    scheme, found = layout.stored[linear.name], layout.modules[linear.name]
    squares = 0.0
    if scheme is None:
        squares = float((read_tensor(found["weight"]).float() - original).square().sum())
    elif scheme.is_float:
        weight = read_tensor(found["weight"]).float()
        scale = read_tensor(found["weight_scale"]).float()
        if scheme.strategy == "block":
            scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            scale = scale[: weight.shape[0], : weight.shape[1]]
        squares = float((weight * scale - original).square().sum())
    else:
        for block in blocks(found, scheme, linear.shape):
            rows = slice(block.first, block.first + len(block.codes))
            squares += float((block.weight() - original[rows]).square().sum())
    norm = float(original.norm())
    return math.sqrt(squares) / norm if norm else math.sqrt(squares)


def _original(source: Layout, linear: Linear, expert: int | None) -> torch.Tensor | None:
    """Return the source's weight in float32, of another expert if asked."""
    name = linear.name
    if expert != linear.expert:
        name = name.replace(f".experts.{linear.expert}.", f".experts.{expert}.")
    if name in source.stored:
        named = source.architecture.linears[name]
        is_plain = source.stored[name] is None and is_readable(source, named)
        return read_tensor(source.modules[name]["weight"]).float() if is_plain else None
    if expert is None:
        return None
    block, _, projection = name.partition(f".experts.{expert}.")
    stack = "down_proj" if projection == "down_proj" else "gate_up_proj"
    stored = source.modules.get(f"{block}.experts.{stack}", {}).get("")
    if stored is None or not stored.is_whole or len(stored.shape) != 3 or expert >= stored.shape[0]:
        return None
    weight = read_rows(stored, expert, 1)[0].float()
    if source.architecture.family == "gpt_oss":  # [in, out], gate and up alternating
        weight = weight.T
        return weight if stack == "down_proj" else weight[projection == "up_proj" :: 2]
    return weight if stack == "down_proj" else weight.chunk(2)[projection == "up_proj"]


def _limit(layout: Layout, linear: Linear) -> float:
    scheme = layout.stored[linear.name]
    if scheme is None:
        return _LIMIT_16_BIT
    return _LIMIT.get(scheme.num_bits, _LIMIT_ABOVE)


def _nearest_expert(layout: Layout, source: Layout, linear: Linear) -> int | None:
    """Return the source's expert whose weight this is, as far as rounding lets one tell."""
    found = {
        expert: _relative_error(layout, source, linear, expert)
        for expert in range(layout.architecture.num_experts)
    }
    near = {expert: e for expert, e in found.items() if e is not None}
    best = min(near, key=lambda expert: near[expert], default=None)
    return best if best is not None and near[best] <= _limit(layout, linear) else None


def _check_others(layout: Layout, source: Layout) -> Iterator[Finding]:
    """Compare norms, embeddings and biases, which quantization leaves alone."""
    originals = {canonical(name): t for name, t in source.checkpoint.tensors.items()}
    for name, tensor in layout.checkpoint.tensors.items():
        original = originals.get(canonical(name))
        is_linear = canonical(name).removesuffix(".weight") in layout.stored
        if is_linear or original is None or not (tensor.is_whole and original.is_whole):
            continue
        if original.shape != tensor.shape:
            yield error("far-from-source", name, f"{tensor.shape}, in the source {original.shape}")
            continue
        before, after = read_tensor(original).float(), read_tensor(tensor).float()
        difference = float((after - before).norm())
        if not difference <= _LIMIT_16_BIT * float(before.norm()):
            yield error("far-from-source", name, f"differs by {difference:.3g} in norm")
