"""The losses that scales are chosen by: the change of a linear's output, or of a block's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from moeq_plugin.core.awq import mean_output_loss
from moeq_plugin.integrations.llm_compressor.awq.batches import without_padding
from moeq_plugin.integrations.llm_compressor.awq.layer_inputs import Moments
from moeq_plugin.integrations.llm_compressor.calibration import ranks

Outputs = list[torch.Tensor]  # of a block, one tensor per batch


class Loss(Protocol):
    """Judges what the weights have been changed to.

    The value is the same on all ranks but for rounding: each chooses the same scales, or the
    weights that they share would not match.
    """

    def __call__(self, before: Outputs, after: Outputs) -> float:
        """Return the mean squared change of outputs.

        Args:
            before: outputs of the block on the weights as they were.
            after: outputs on the weights that are tried.
        """


@dataclass(frozen=True)
class LinearLoss:
    """Of a linear judged alone, over its tokens with their weights; nothing has to run for it.

    Attributes:
        linear: holds the weight that is tried.
        original: ``[out, in]``, the weight as it was.
        moments: of the linear's inputs.
    """

    linear: nn.Linear
    original: torch.Tensor
    moments: Moments

    def __call__(self, before: Outputs, after: Outputs) -> float:
        """Return the mean over tokens and outputs; see :class:`Loss`."""
        change = self.linear.weight - self.original
        loss = mean_output_loss(change, self.moments.hessian, self.moments.weight_sum)
        return ranks.mean_over_ranks(loss, 1, change.device)


@dataclass(frozen=True)
class BlockLoss:
    """Of a block, over all tokens that are no padding; combine weights act in its output already.

    Attributes:
        squared_change: the host's mean squared difference of outputs.
        masks: token masks of the batches; empty if no padding is among them.
    """

    squared_change: Callable[[Outputs, Outputs], float]
    masks: list[torch.Tensor | None]

    def __call__(self, before: Outputs, after: Outputs) -> float:
        """Return the mean over tokens and outputs; see :class:`Loss`."""
        if self.masks:
            before = list(map(without_padding, before, self.masks))
            after = list(map(without_padding, after, self.masks))
        count = sum(outputs.numel() for outputs in before)
        mean = float(self.squared_change(before, after))
        return ranks.mean_over_ranks(mean, count, before[0].device)
