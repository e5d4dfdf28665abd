"""The tensors that quantization will write, of a model that is described by its config or built."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moeq_plugin.checkpoint.architecture import Saved
from moeq_plugin.checkpoint.codebooks import Codebooks
from moeq_plugin.checkpoint.formats import tensors_of
from moeq_plugin.checkpoint.headers import BITS
from moeq_plugin.checkpoint.layout import FUSED_EXPERTS, Layout
from moeq_plugin.checkpoint.reader_names import in_file
from moeq_plugin.checkpoint.schemes import Scheme
from moeq_plugin.core.names import canonical, is_prediction

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_NAMES = {letters: name for name, letters in _DTYPES.items()}
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


def outputs_of(layout: Layout, targeted: set[str], scheme: Scheme | Codebooks) -> Iterator[Output]:
    """Yield what saving the quantized model writes.

    Args:
        layout: the 16-bit model.
        targeted: canonical names of the linears that get the scheme.
        scheme: for these.

    Raises:
        ValueError: if the scheme's format is not known.
    """
    saved = layout.architecture.saved
    if saved is None:
        yield from _as_described(layout, targeted, scheme)
    else:
        yield from _as_built(layout, saved, targeted, scheme)


def copied_tensors(layout: Layout) -> list[Output]:
    """Return what is copied beside them: layers for next-token prediction, into other files."""
    tensors, num_layers = layout.checkpoint.tensors.items(), layout.architecture.num_layers
    return [Output(n, t.dtype, t.shape) for n, t in tensors if is_prediction(n, num_layers)]


def loaded_shapes(layout: Layout) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of what transformers loads."""
    if layout.architecture.saved is not None:
        yield from (shape for _, shape in layout.architecture.saved.tensors.values())
        return
    for name, tensor in layout.checkpoint.tensors.items():
        if _is_loaded(layout, name):
            yield tensor.shape


def _is_loaded(layout: Layout, name: str) -> bool:
    """Tell whether transformers loads a tensor: not those for next-token prediction."""
    return not is_prediction(name, layout.architecture.num_layers)


def _as_described(
    layout: Layout, targeted: set[str], scheme: Scheme | Codebooks
) -> Iterator[Output]:
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
        wanted = scheme if linear.name in targeted else None
        yield from _of_linear(name, wanted, linear.shape, stored)
        bias = f"{linear.name}.bias"
        if bias in architecture.others and bias not in seen:  # of fused experts
            yield Output(f"{name}.bias", stored, architecture.others[bias])


def _as_built(
    layout: Layout, saved: Saved, targeted: set[str], scheme: Scheme | Codebooks
) -> Iterator[Output]:
    names = {f"{saved.names[name]}.weight": layout.architecture.linears[name] for name in targeted}
    for name, (dtype, shape) in saved.tensors.items():
        if name in names:
            module = name.removesuffix(".weight")
            yield from _of_linear(module, scheme, names[name].shape, dtype)
        else:
            yield Output(name, dtype, shape)


def _of_linear(
    name: str, scheme: Scheme | Codebooks | None, shape: tuple[int, int], dtype: str
) -> Iterator[Output]:
    """Yield the tensors of a linear, floats among them in the model's dtype.

    Raises:
        ValueError: if the scheme's format is not known.
    """
    if isinstance(scheme, Codebooks):
        form = replace(scheme, scale_dtype=_NAMES[dtype])
        yield Output(f"{name}.packed", "I32", (form.num_words(shape),))
        return
    wanted = tensors_of(scheme, shape)
    if wanted is None:
        raise ValueError(f"the sizes of format {scheme and scheme.form!r} are not known here")
    for suffix, part in wanted.items():
        is_float = "BF16" in part.dtypes
        yield Output(f"{name}.{suffix}", dtype if is_float else part.dtypes[0], part.shape)


def _is_fused(name: str) -> bool:
    return name.endswith(
        tuple(f".experts.{stack}{tail}" for stack in FUSED_EXPERTS for tail in _TAILS)
    )


_TAILS = ("", "_bias")
