"""Which tokens of the running batch are padding.

The host hands its batches to no modifier, and what reaches the layers are masks of attention, of
another shape in every family. So the masks are noted where the host's sequential pipeline caches
its batches, and read from the arguments where a pipeline calls the whole model.
"""

from __future__ import annotations

from typing import Any

import torch
from llmcompressor.core import State
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import nn

_COLUMNS = ("input_ids", "attention_mask", "domain")


class PaddingWatch:
    """Knows the token mask of the batch that is running.

    Args:
        state: the host's state, which counts batches.

    Attributes:
        batches: token ids, masks and domains, as far as there are any, of the cached batches.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self.batches: list[dict[str, torch.Tensor]] = []
        # of the running batch, in pipelines that call the whole model; the sequential one does not
        self._direct: torch.Tensor | None = None

    def hear_batches(self, cache: IntermediatesCache) -> None:
        """Note ids and masks of the batches that the sequential pipeline has just cached."""
        # at once: the host goes on to delete from its cache what no later layer needs
        self.batches = [cache.fetch(index, list(_COLUMNS)) for index in range(len(cache))]

    def read(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the mask that the whole model is called with; a forward pre-hook."""
        self._direct = kwargs.get("attention_mask")

    @property
    def batch_index(self) -> int:
        """Return the number of the running batch."""
        return int(self._state.current_batch_idx)  # which the host sets before each forward

    def keep(self, num_rows: int) -> torch.Tensor | None:
        """Return ``[num_rows]`` bool, false for padding; ``None`` if nothing is padded.

        Args:
            num_rows: tokens of the batch. Modules that see other rows, such as a vision tower,
                are not masked.
        """
        mask = self._direct
        if mask is None and self.batches:
            mask = self.batches[self.batch_index].get("attention_mask")
        if mask is None or mask.numel() != num_rows:
            return None
        return mask.bool().flatten()
