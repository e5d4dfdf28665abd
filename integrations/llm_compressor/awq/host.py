"""What llm-compressor 0.14 has to be spared for its AWQ to run everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from compressed_tensors.quantization import disable_quantization, enable_quantization
from compressed_tensors.utils import patch_attr
from llmcompressor.modifiers.transform.awq import base
from llmcompressor.pipelines.cache import IntermediatesCache
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


@contextlib.contextmanager
def summed_already() -> Iterator[None]:
    """Keep the host from adding up over ranks, which it does on accelerators only (0.14)."""
    with patch_attr(base, "is_distributed", lambda: False):
        yield


@contextlib.contextmanager
def without_pinning() -> Iterator[None]:
    """Pin no memory where there is no accelerator; the host (0.14) fails there."""
    if torch.accelerator.is_available():
        yield
        return
    with patch_attr(IntermediatesCache, "pin_memory", lambda *_args: None):
        yield
