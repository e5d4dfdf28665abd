"""What a block is called with, in fewer and larger batches, and which of its tokens are padding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import nn

from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch

_TOKENS = 8192  # experts get their share of them at a time: enough to keep a device busy


class BatchMasks:
    """Token masks of all batches, whichever pipeline runs the model.

    Args:
        padding: hears of the batches of the host's sequential pipeline.
    """

    def __init__(self, padding: PaddingWatch) -> None:
        self._padding = padding
        self._direct: list[torch.Tensor | None] = []

    def note(self, _model: nn.Module, _args: object, kwargs: Mapping[str, torch.Tensor]) -> None:
        """Note the mask that the whole model is called with; a forward pre-hook."""
        self._direct.append(kwargs.get("attention_mask"))

    def of_batches(self) -> list[torch.Tensor | None]:
        """Return the mask of each batch, in their order; a batch may have none."""
        cached = [batch.get("attention_mask") for batch in self._padding.batches]
        return cached or self._direct


def without_padding(rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return ``[tokens, features]``, those of padding left out.

    Args:
        rows: ``[..., features]``.
        mask: of the same tokens, false for padding; any other, or ``None``, masks nothing.
    """
    rows = rows.flatten(0, -2)
    if mask is None or mask.numel() != len(rows):
        return rows
    return rows[mask.flatten().bool().to(rows.device)]


def merged(
    cache: IntermediatesCache, masks: list[torch.Tensor | None]
) -> IntermediatesCache | None:
    """Return what a block was called with in few batches, padding left out.

    The search for scales runs a block some twenty times on all of it, and calling every expert for
    the few tokens that one sequence sends it takes longer than the products do.

    Args:
        cache: the arguments of each call.
        masks: of the batches, or none.

    Returns:
        ``None`` if the block is called with more than hidden states, or all is padding.
    """
    larger = IntermediatesCache(None, cache.offload_device)
    pending: list[torch.Tensor] = []
    for index, batch in enumerate(cache):
        ((name, hidden), *others) = batch.items()
        if others or not isinstance(hidden, torch.Tensor):
            return None
        pending.append(without_padding(hidden, masks[index] if masks else None))
        tokens = sum(map(len, pending))
        if tokens >= _TOKENS or (tokens and index == len(cache) - 1):
            larger.append({name: torch.cat(pending)[None]})
            pending = []
    return larger if len(larger) else None
