"""Are the weights in codebooks there, of their size, and numbers that a quantizer writes?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch

from moeq_plugin.checkpoint.checks.findings import Finding, error
from moeq_plugin.checkpoint.codebooks import Codebooks, shape_of
from moeq_plugin.checkpoint.codes import can_read, read_tensor
from moeq_plugin.checkpoint.headers import StoredTensor
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.core.packed_codebook import FORMAT_VERSION, PackedFormat

# the largest entry of a codebook is what its scale was made of; a scale is rounded to 8 bits
_SMALLEST_MAXIMUM = 126
_FAR = 0.7  # of the weight's norm: codes of another weight are sqrt(2) away, 2 bits at most 0.5


def check_codebooks(layout: Layout, source: Layout | None = None) -> Iterator[Finding]:
    """Yield what is wrong with weights in codebooks.

    Args:
        layout: the checkpoint.
        source: the 16-bit model, to compare every weight with.
    """
    checkpoint = layout.checkpoint
    for name, codebooks in checkpoint.codebooks.items():
        tensor = checkpoint.tensors.get(f"{name}.packed")
        if tensor is None:
            yield error("missing-tensor", f"{name}.packed", "config.json lists its codebooks")
        elif tensor.dtype != "I32" or len(tensor.shape) != 1:
            what = f"expected [words] I32, found {list(tensor.shape)} {tensor.dtype}"
            yield error("wrong-dtype", tensor.name, what)
        elif can_read(tensor):
            yield from _check_weight(layout, source, name, codebooks, tensor)
    listed = {f"{name}.packed" for name in checkpoint.codebooks}
    for tensor in checkpoint.tensors.values():
        if tensor.name.endswith(".packed") and tensor.name not in listed:
            yield error("unexpected-tensor", tensor.name, "config.json lists no codebooks of it")


def _check_weight(
    layout: Layout, source: Layout | None, name: str, codebooks: Codebooks, tensor: StoredTensor
) -> Iterator[Finding]:
    original = source.checkpoint.tensors.get(f"{name}.weight") if source is not None else None
    shape = shape_of(name, layout.checkpoint.config)
    if shape is None or shape[1] % codebooks.vector_dim:
        return
    if tensor.shape[0] != codebooks.num_words(shape):
        what = f"expected {codebooks.num_words(shape)} words for {list(shape)}"
        yield error("wrong-shape", tensor.name, f"{what}, found {tensor.shape[0]}")
        return
    form = PackedFormat(**asdict(codebooks))
    packed = read_tensor(tensor)
    if layout.checkpoint.codebook_version != FORMAT_VERSION:
        packed = form.from_version_2(packed, shape)
    parts = form.parts(packed, shape)
    if not parts.scales.isfinite().all() or (parts.scales <= 0).any():
        yield error("scale-not-positive", tensor.name, "scales of codebooks must be positive")
        return
    largest = parts.codebooks.short().abs().amax((-2, -1))
    odd = int(((largest < _SMALLEST_MAXIMUM) & (largest > 0)).sum())
    if odd:
        what = f"{odd} of {largest.numel()} codebooks do not reach up to their scale"
        yield error("saturated", tensor.name, what)
    if original is None or not can_read(original):
        return
    weight = read_tensor(original).float().view(shape)
    change = (form.unpack(packed, shape).decode().float() - weight).norm()
    if change > _FAR * weight.norm().clamp(min=torch.finfo(torch.float32).tiny):
        what = f"differs by {change / weight.norm():.2f} of its norm from the source"
        yield error("far-from-source", tensor.name, what)
