"""Which tokens of the running batch are padding.

The host hands an ``attention_mask`` to decoder layers but not to modifiers, so it is read where
it passes: as an argument of every module below the model that takes one.
"""

from __future__ import annotations

import inspect

import torch
from loguru import logger
from torch import nn


def takes_attention_mask(module: nn.Module) -> bool:
    """Tell whether a module's forward has an ``attention_mask`` argument."""
    return "attention_mask" in inspect.signature(module.forward).parameters


def token_mask(attention_mask: object) -> torch.Tensor | None:
    """Return ``[batch * sequence]`` bool, false for padding; ``None`` if nothing is padded.

    A two-dimensional mask says so itself. In a four-dimensional one, boolean or additive, a token
    is real exactly if it may attend to itself: that holds for causal, sliding and chunked masks.

    Args:
        attention_mask: what a decoder layer received.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim not in (2, 4):
        logger.bind(log_once=True).warning(
            f"Cannot read padding from a {type(attention_mask).__name__} attention mask: all "
            "tokens count as real. Use attn_implementation='sdpa' for padded calibration data."
        )
        return None
    if attention_mask.ndim == 2:
        return attention_mask.bool().flatten()
    to_itself = attention_mask[:, 0].diagonal(dim1=1, dim2=2)
    allowed = to_itself if to_itself.dtype == torch.bool else to_itself == 0
    return allowed.flatten()


class PaddingWatch:
    """Remembers the token mask of the batch that is running."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None

    def read(self, _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Take the mask from a module's arguments; a forward pre-hook."""
        parameters = list(inspect.signature(_module.forward).parameters)
        position = parameters.index("attention_mask")
        mask = args[position] if position < len(args) else kwargs.get("attention_mask")
        self.mask = token_mask(mask)

    def keep(self, num_rows: int) -> torch.Tensor | None:
        """Return the mask if it describes ``num_rows`` tokens, ``None`` if there is none."""
        return self.mask if self.mask is not None and len(self.mask) == num_rows else None
