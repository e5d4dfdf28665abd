"""What a model's draw costs in log-likelihood, within the memory of the logits and their gradient.

With a large vocabulary the logits of a batch are by far the largest tensor of a pass, and the usual
way to this loss holds six of them at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

from moeq_plugin.core.parts import row_parts
from moeq_plugin.core.sampling import draw

_AT_ONCE = 2**24  # logits


def surprise(logits: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Return minus the log-likelihood, summed, of one draw per row of ``[tokens, classes]``.

    Args:
        logits: of the classes; gradients go back to them once.
        chance: ``[tokens]``, uniform in [0, 1), decides the draws.
    """
    result: torch.Tensor = _Surprise.apply(logits, chance)  # type: ignore[no-untyped-call]
    return result


class _Surprise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
        drawn = torch.empty(len(logits), 1, dtype=torch.int64, device=logits.device)
        total = torch.zeros((), device=logits.device)
        for rows, log_probs in _log_probs(logits):
            drawn[rows] = draw(log_probs.exp(), chance[rows])
            total -= log_probs.gather(1, drawn[rows]).sum()
        ctx.save_for_backward(logits, drawn)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, drawn = ctx.saved_tensors  # type: ignore[attr-defined]
        result = torch.empty_like(logits)
        for rows, log_probs in _log_probs(logits):
            expected = log_probs.exp_()
            expected.scatter_add_(1, drawn[rows], torch.full_like(expected[:, :1], -1))
            result[rows] = expected.mul_(gradient)
        return result, None


def _log_probs(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield some rows at a time, and in float32 the logarithms of their probabilities."""
    for rows in row_parts(logits[None], _AT_ONCE):
        yield rows, logits[rows].float().log_softmax(-1)
