"""Are scales such as the readers of their format can multiply with?

Every reader of symmetric integers that was run or read multiplies codes by their scale and by
nothing else of it, so that its sign passes. Elsewhere a scale is a size: zero points are computed
on a range that it spans, kernels for small floats have no bit for its sign, activations are divided
by it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moeq_plugin.checkpoint.checks.findings import Finding, error, warning
from moeq_plugin.checkpoint.codes import pieces, read_tensor
from moeq_plugin.checkpoint.headers import StoredTensor
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.checkpoint.schemes import GPTQ_FORMS, Scheme

OF_WEIGHTS = ("weight_scale", "scales")
SCALES = (*OF_WEIGHTS, "input_scale", "weight_global_scale", "input_global_scale")
_SMALL_FLOATS = "F8_E4M3"  # scales of small floats, in units of a scale of the whole weight
SCALE_DTYPES = ("BF16", "F16", "F32", "F64", _SMALL_FLOATS)
_OUTLIER = 1e4  # times the median scale of the weight
_USUAL = (1e-12, 1e4)  # of the median
_LARGEST = 1e8
# half precision is read as it is down to zero; in wider types readers flush what is smaller to zero
_SMALLEST_NORMAL = float(torch.finfo(torch.float32).tiny)
# solvers that try both signs turn a quarter of all scales or more, at any width
_FEW, _ENOUGH = 1 / 64, 256
_SIGNED_FORMS = ("pack-quantized", "int-quantized", "naive-quantized", *GPTQ_FORMS)
_FLOAT_FORM = "float-quantized"


def unsigned_scales(layout: Layout) -> set[str]:
    """Return the names of the tensors of weights whose known scheme takes no negative scales."""
    return {
        layout.modules[linear.name][suffix].name
        for linear in layout.present()
        if _is_unsigned(layout.stored[linear.name])
        for suffix in OF_WEIGHTS
        if suffix in layout.modules[linear.name]
    }


def _is_unsigned(scheme: Scheme | None) -> bool:
    """Tell whether readers are known to go wrong; what nobody here knows may be as it should be."""
    if scheme is None or scheme.form not in (*_SIGNED_FORMS, _FLOAT_FORM):
        return False
    return not scheme.symmetric or scheme.is_float or scheme.form == _FLOAT_FORM


def check_scales(tensor: StoredTensor, *, may_be_signed: bool) -> Iterator[Finding]:
    """Yield what is wrong with a tensor of scales.

    Args:
        tensor: a whole one.
        may_be_signed: whether its readers take negative scales.
    """
    lowest, largest, num_negative, count = float("inf"), 0.0, 0, 0
    smallest = float("inf")  # in size
    for part in pieces(tensor):
        part = part.float()
        if not part.numel():
            continue
        if not bool(part.isfinite().all()):
            yield error("non-finite", tensor.name, "NaN or infinity")
            return
        lowest = min(lowest, float(part.min()))
        sizes = part.abs()
        smallest, largest = min(smallest, float(sizes.min())), max(largest, float(sizes.max()))
        num_negative, count = num_negative + int((part < 0).sum()), count + part.numel()
    if num_negative and not may_be_signed:
        what = f"smallest scale {lowest:.4g}; only symmetric integer weights may have negative ones"
        yield error("scale-not-positive", tensor.name, what)
    elif smallest < _SMALLEST_NORMAL and tensor.dtype != _SMALL_FLOATS:
        what = f"a scale of {smallest:.4g}, which is zero to readers"
        yield error("scale-not-positive", tensor.name, what)
    elif count and tensor.name.endswith(OF_WEIGHTS) and tensor.dtype != _SMALL_FLOATS:
        yield from _check_sizes(tensor, largest)
        if 0 < num_negative < _FEW * count and count >= _ENOUGH:
            what = f"{num_negative} of {count} scales are negative: so few are no solver's choice"
            yield warning("scale-sign", tensor.name, what)


def _check_sizes(tensor: StoredTensor, largest: float) -> Iterator[Finding]:
    median = float(read_tensor(tensor).float().abs().median())
    if not _USUAL[0] <= median <= _USUAL[1] or largest > _LARGEST:
        what = f"median {median:.4g}, largest {largest:.4g}: no weight has such scales"
        yield error("magnitude", tensor.name, what)
    elif len(tensor.shape) == 2 and largest > _OUTLIER * median:
        what = f"largest {largest:.4g}, median {median:.4g}"
        yield warning("scale-outlier", tensor.name, what)
