"""Running a model on its weights as they are, schemes or not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from compressed_tensors.quantization import disable_quantization, enable_quantization
from torch import nn


@contextlib.contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """Run on the weights as they are; in the host's basic pipeline schemes are at work by then.

    Their scales are not initialized when scales of activations are moved, so what would come out
    is whatever the memory held.

    Args:
        model: the model.
    """
    at_work = [m for m in model.modules() if getattr(m, "quantization_enabled", False)]
    for module in at_work:
        disable_quantization(module)
    try:
        yield
    finally:
        for module in at_work:
            enable_quantization(module)
