"""What the layers of RWKV-6 and RWKV-7 have in common: their state, token shift, mask and heads."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LayerState(NamedTuple):
    """What one layer remembers of the tokens before.

    Attributes:
        att_shift: ``[batch, hidden]`` last input of the time mix.
        wkv: ``[batch, heads, size, size]`` the heads' matrices, float32 or wider.
        ffn_shift: ``[batch, hidden]`` last input of the channel mix.
    """

    att_shift: torch.Tensor
    wkv: torch.Tensor
    ffn_shift: torch.Tensor


def empty_state(hidden: torch.Tensor, num_heads: int) -> LayerState:
    """Return the state before the first token of ``[batch, tokens, hidden]``."""
    batch, _, channels = hidden.shape
    size, shift = channels // num_heads, hidden.new_zeros(batch, channels)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return LayerState(shift, hidden.new_zeros(batch, num_heads, size, size, dtype=dtype), shift)


def previous_tokens(x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Shift ``[batch, tokens, hidden]`` by one token; ``[batch, hidden]`` precedes the first."""
    return torch.cat([before[:, None].to(x.dtype), x[:, :-1]], 1)


def token_mask(attention_mask: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    """Return ``[batch, tokens, 1]`` in the dtype of ``x``: the mask's last columns.

    ``generate`` hands over the mask of all tokens so far with the newest of them.
    """
    return None if attention_mask is None else attention_mask[:, -x.shape[1] :, None].to(x)


def split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Turn ``[batch, tokens, hidden]`` into ``[batch, heads, tokens, size]``, at least float32."""
    x = x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """Undo :func:`split_heads`, except for the dtype."""
    return x.transpose(1, 2).flatten(-2)
