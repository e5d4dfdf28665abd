"""Are two tensors the same, as far as the dtypes that they are stored in can say?"""

from __future__ import annotations

import torch

from moeq_plugin.checkpoint.codes import can_read, read_tensor
from moeq_plugin.checkpoint.headers import StoredTensor

_STEP = {"BF16": 2**-7, "F16": 2**-10, "F32": 2**-20, "F64": 2**-20}  # relative, with a margin
_SMALLEST = {"F16": 1e-7}  # what is smaller may have been rounded to nothing
_OTHER_STEP = 2**-20


def difference(after: StoredTensor, before: StoredTensor) -> str | None:
    """Return how a tensor differs from the source's, ``None`` if not beyond a change of dtype."""
    if after.shape != before.shape:
        return f"{list(after.shape)}, in the source {list(before.shape)}"
    if not can_read(after) or not can_read(before):
        return None
    return unequal(
        read_tensor(after).float(), read_tensor(before).float(), {after.dtype, before.dtype}
    )


def unequal(after: torch.Tensor, before: torch.Tensor, dtypes: set[str]) -> str | None:
    """Return how many elements differ by more than rounding to the coarser of the dtypes.

    Args:
        after: float32.
        before: likewise, of the same shape.
        dtypes: in which the two are stored.
    """
    step = max(_STEP.get(dtype, _OTHER_STEP) for dtype in dtypes)
    if len(dtypes) == 1:
        step = _OTHER_STEP
    smallest = max(_SMALLEST.get(dtype, 0.0) for dtype in dtypes)
    apart = (after - before).abs()
    wrong = ~(apart <= step * before.abs() + smallest)
    if not bool(wrong.any()):
        return None
    size = float((after - before).norm()) / max(float(before.norm()), 1e-30)
    return f"{int(wrong.sum())} of {wrong.numel()} elements differ, by {size:.3g} of its norm"
