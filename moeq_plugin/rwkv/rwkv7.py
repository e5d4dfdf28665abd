"""RWKV-7 "Goose" (x070, arXiv:2503.14456) as a transformers model in plain PyTorch.

Every matrix is an ``nn.Linear``, also the factors of the low-rank ones, and every element-wise
weight an :class:`~moeq_plugin.models.elementwise.ElementwiseScale`, so that both can be hooked and
quantized. Names are the official ones (``receptance``, ``w1``, ``k_k``).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import initialization as init

from moeq_plugin.models.elementwise import ElementwiseScale
from moeq_plugin.rwkv.config import RWKVConfig
from moeq_plugin.rwkv.layers import (
    LayerState,
    empty_state,
    merge_heads,
    previous_tokens,
    split_heads,
    token_mask,
)
from moeq_plugin.rwkv.modeling import RWKVForCausalLM, RWKVModel, RWKVPreTrainedModel
from moeq_plugin.rwkv.official import Tensors, shared_sizes, size_of
from moeq_plugin.rwkv.scan import rwkv7_scan

_STRONGEST_LOG_DECAY = -math.exp(-0.5)


class RWKV7Config(RWKVConfig):
    """Sizes of an RWKV-7; the defaults are those of the smallest published model.

    The channel mix has four times as many channels by default.

    Attributes:
        a_low_rank_dim: rank of ``a1``, ``a2``.
        v_low_rank_dim: rank of ``v1``, ``v2``.
        gate_low_rank_dim: rank of ``g1``, ``g2``.
    """

    model_type = "rwkv7"

    a_low_rank_dim: int = 64
    v_low_rank_dim: int = 32
    gate_low_rank_dim: int = 128

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what is left open."""
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        super().__post_init__(**kwargs)

    @classmethod
    def of_tensors(cls, tensors: Tensors) -> Self:
        """Read the sizes of a model from its official tensors."""
        sizes = shared_sizes(tensors)
        return cls(
            **sizes,
            head_dim=size_of(tensors, "blocks.0.att.r_k", 1, sizes["hidden_size"]),
            decay_low_rank_dim=size_of(tensors, "blocks.0.att.w1", 1, 1),
            a_low_rank_dim=size_of(tensors, "blocks.0.att.a1", 1, 1),
            v_low_rank_dim=size_of(tensors, "blocks.1.att.v1", 1, 1),
            gate_low_rank_dim=size_of(tensors, "blocks.0.att.g1", 1, 1),
        )


class RWKV7TimeMix(nn.Module):
    """A head's matrix is decayed, corrected by the delta rule and read, once per token."""

    def __init__(self, config: RWKV7Config, layer_index: int) -> None:
        super().__init__()
        hidden, self.num_heads = config.hidden_size, config.hidden_size // config.head_dim
        mix = partial(ElementwiseScale, 1, 1, hidden, first=1, last=0)
        self.x_r, self.x_w, self.x_k = mix(), mix(), mix()
        self.x_v, self.x_a, self.x_g = mix(), mix(), mix()
        self.k_k = ElementwiseScale(1, 1, hidden, first=0.7, last=0.7)
        self.k_a = ElementwiseScale(1, 1, hidden, first=1, last=1)
        self.r_k = ElementwiseScale(self.num_heads, config.head_dim, first=0, last=0)
        square = partial(nn.Linear, hidden, hidden, bias=False)
        self.receptance, self.key, self.value, self.output = square(), square(), square(), square()
        self.w1, self.w2, self.w0 = _low_rank(hidden, config.decay_low_rank_dim)
        self.a1, self.a2, self.a0 = _low_rank(hidden, config.a_low_rank_dim)
        self.g1, self.g2, _ = _low_rank(hidden, config.gate_low_rank_dim)
        self.mixes_values = layer_index > 0  # with those of the first layer
        if self.mixes_values:
            self.v1, self.v2, self.v0 = _low_rank(hidden, config.v_low_rank_dim)
        self.ln_x = nn.GroupNorm(self.num_heads, hidden, eps=config.head_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        v_first: torch.Tensor | None,
        mask: torch.Tensor | None,
        before: torch.Tensor,
        wkv: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mix ``[batch, tokens, hidden]``.

        Args:
            x: normed hidden states.
            v_first: values of the first layer, ``None`` in the first layer.
            mask: ``[batch, tokens, 1]``, 0 where the state must not change.
            before: ``[batch, hidden]``, the ``x`` of the token before.
            wkv: state of the heads.

        Returns:
            The result, the values of the first layer, and the new state of the heads.
        """
        dx = previous_tokens(x, before) - x
        r, k = self.receptance(x + self.x_r(dx)), self.key(x + self.x_k(dx))
        w = self.w0 + self.w2(self.w1(x + self.x_w(dx)).tanh())
        a = (self.a0 + self.a2(self.a1(x + self.x_a(dx)))).sigmoid()
        g = self.g2(self.g1(x + self.x_g(dx)).sigmoid())
        xv = x + self.x_v(dx)
        v = self.value(xv)
        if self.mixes_values and v_first is not None:
            v = v + (v_first - v) * (self.v0 + self.v2(self.v1(xv))).sigmoid()
        else:
            v_first = v
        removed = self.k_k(k)
        k = k + self.k_a(k * (a - 1))
        log_decay = _STRONGEST_LOG_DECAY * w.to(wkv.dtype).sigmoid()
        if mask is not None:
            log_decay, k, removed = log_decay * mask, k * mask, removed * mask
        r, log_decay, k, value, a, removed = (
            split_heads(y, self.num_heads) for y in (r, log_decay, k, v, a, removed)
        )
        removed = normalize(removed, dim=-1)
        output, wkv = rwkv7_scan(r, log_decay, k, value, -removed, removed * a, wkv)
        output = self.ln_x(merge_heads(output).flatten(0, 1).to(x.dtype)).view_as(x)
        bonus = self.r_k((r * k).transpose(1, 2)).sum(-1, keepdim=True) * value.transpose(1, 2)
        return self.output((output + bonus.flatten(-2).to(x.dtype)) * g), v_first, wkv


def _low_rank(hidden: int, rank: int) -> tuple[nn.Linear, nn.Linear, nn.Parameter]:
    """Return both factors of a low-rank matrix and what is added to its output."""
    return (
        nn.Linear(hidden, rank, bias=False),
        nn.Linear(rank, hidden, bias=False),
        nn.Parameter(torch.empty(1, 1, hidden)),
    )


class RWKV7ChannelMix(nn.Module):
    """A feed-forward network with a squared ReLU."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.x_k = ElementwiseScale(1, 1, config.hidden_size, first=1, last=0)
        self.key = nn.Linear(config.hidden_size, config.intermediate_size or 0, bias=False)
        self.value = nn.Linear(config.intermediate_size or 0, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Mix ``[batch, tokens, hidden]``; ``before`` is the ``x`` of the token before."""
        mixed = x + self.x_k(previous_tokens(x, before) - x)
        result: torch.Tensor = self.value(self.key(mixed).relu().square())
        return result


class RWKV7Block(nn.Module):
    """One layer: time mix, then channel mix, each after a norm and added to what came in."""

    def __init__(self, config: RWKV7Config, layer_index: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, config.hidden_size, eps=config.norm_eps)
        self.ln0 = norm() if layer_index == 0 else None
        self.ln1, self.ln2 = norm(), norm()
        self.att = RWKV7TimeMix(config, layer_index)
        self.ffn = RWKV7ChannelMix(config)

    def forward(
        self,
        hidden: torch.Tensor,
        v_first: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        state: LayerState | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, LayerState]:
        """Return new ``[batch, tokens, hidden]``, the first layer's values and the new state."""
        mask = token_mask(attention_mask, hidden)
        if self.ln0 is not None:
            hidden = self.ln0(hidden)
        if state is None:
            state = empty_state(hidden, self.att.num_heads)
        x = self.ln1(hidden) if mask is None else self.ln1(hidden) * mask
        mixed, v_first, wkv = self.att(x, v_first, mask, state.att_shift, state.wkv)
        hidden = hidden + mixed
        y = self.ln2(hidden) if mask is None else self.ln2(hidden) * mask
        hidden = hidden + self.ffn(y, state.ffn_shift)
        return hidden, v_first, LayerState(x[:, -1], wkv, y[:, -1])


class _RWKV7PreTrainedModel(RWKVPreTrainedModel):
    config_class = RWKV7Config
    block_class = RWKV7Block
    _no_split_modules = ["RWKV7Block"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize what transformers does not: half of the heads' channels remember long."""
        super()._init_weights(module)
        if isinstance(module, RWKV7TimeMix):
            ramp = torch.linspace(-6, 0, module.w0.numel(), device=module.w0.device)
            init.copy_(module.w0, ramp.view_as(module.w0))
            init.zeros_(module.a0)
            if module.mixes_values:
                init.constant_(module.v0, 0.5)


class RWKV7Model(_RWKV7PreTrainedModel, RWKVModel):
    """RWKV-7 without its head."""


class RWKV7ForCausalLM(_RWKV7PreTrainedModel, RWKVForCausalLM):
    """RWKV-7 that predicts the next token."""

    model_class = RWKV7Model
    version = 7
