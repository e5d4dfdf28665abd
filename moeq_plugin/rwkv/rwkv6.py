"""RWKV-6 "Finch" (x060, arXiv:2404.05892) as a transformers model in plain PyTorch.

Built like :mod:`moeq_plugin.rwkv.rwkv7`: every matrix an ``nn.Linear``, every element-wise
weight hookable, names the official ones (``time_maa_w``, ``time_decay_w1``).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.nn.functional import silu
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
from moeq_plugin.rwkv.scan import rwkv6_scan


class RWKV6Config(RWKVConfig):
    """Sizes of an RWKV-6; the defaults are those of the smallest published model.

    The channel mix has 3.5 times as many channels by default, rounded down to a multiple of 32.

    Attributes:
        maa_low_rank_dim: rank of each of the five mixes in ``time_maa_w1``, ``time_maa_w2``.
    """

    model_type = "rwkv6"

    hidden_size: int = 2048
    num_hidden_layers: int = 24
    maa_low_rank_dim: int = 32

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what is left open."""
        self.intermediate_size = self.intermediate_size or int(self.hidden_size * 3.5) // 32 * 32
        super().__post_init__(**kwargs)

    @classmethod
    def of_tensors(cls, tensors: Tensors) -> Self:
        """Read the sizes of a model from its official tensors."""
        sizes = shared_sizes(tensors)
        return cls(
            **sizes,
            head_dim=size_of(tensors, "blocks.0.att.time_faaaa", -1, sizes["hidden_size"]),
            maa_low_rank_dim=size_of(tensors, "blocks.0.att.time_maa_w1", 1, 5) // 5,
            decay_low_rank_dim=size_of(tensors, "blocks.0.att.time_decay_w1", 1, 1),
        )


class RWKV6TimeMix(nn.Module):
    """A head's matrix is decayed, added to and read, once per token."""

    def __init__(self, config: RWKV6Config) -> None:
        super().__init__()
        hidden, self.num_heads = config.hidden_size, config.hidden_size // config.head_dim
        mix = partial(ElementwiseScale, 1, 1, hidden, first=1, last=0)
        self.time_maa_x, self.time_maa_w, self.time_maa_k = mix(), mix(), mix()
        self.time_maa_v, self.time_maa_r, self.time_maa_g = mix(), mix(), mix()
        linear = partial(nn.Linear, bias=False)
        self.time_maa_w1 = linear(hidden, 5 * config.maa_low_rank_dim)
        self.time_maa_w2 = nn.ModuleList(linear(config.maa_low_rank_dim, hidden) for _ in range(5))
        self.time_decay_w1 = linear(hidden, config.decay_low_rank_dim)
        self.time_decay_w2 = linear(config.decay_low_rank_dim, hidden)
        self.time_decay = nn.Parameter(torch.empty(1, 1, hidden))
        self.time_faaaa = nn.Parameter(torch.empty(self.num_heads, config.head_dim))
        square = partial(linear, hidden, hidden)
        self.receptance, self.key, self.value = square(), square(), square()
        self.output, self.gate = square(), square()
        self.ln_x = nn.GroupNorm(self.num_heads, hidden, eps=config.head_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        before: torch.Tensor,
        wkv: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix ``[batch, tokens, hidden]``.

        Args:
            x: normed hidden states.
            mask: ``[batch, tokens, 1]``, 0 where the state must not change.
            before: ``[batch, hidden]``, the ``x`` of the token before.
            wkv: state of the heads.

        Returns:
            The result, and the new state of the heads.
        """
        dx = previous_tokens(x, before) - x
        low = self.time_maa_w1(x + self.time_maa_x(dx)).tanh().chunk(5, -1)
        scales = self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g
        xw, xk, xv, xr, xg = (
            x + scale(dx) + dx * factor(y)
            for scale, factor, y in zip(scales, self.time_maa_w2, low, strict=True)
        )
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = self.time_decay + self.time_decay_w2(self.time_decay_w1(xw).tanh())
        log_decay = -w.to(wkv.dtype).exp()
        if mask is not None:
            log_decay, k = log_decay * mask, k * mask
        r, log_decay, k, v = (split_heads(y, self.num_heads) for y in (r, log_decay, k, v))
        output, wkv = rwkv6_scan(r, log_decay, k, v, self.time_faaaa.to(wkv.dtype), wkv)
        output = self.ln_x(merge_heads(output).flatten(0, 1).to(x.dtype)).view_as(x)
        return self.output(output * silu(self.gate(xg))), wkv


class RWKV6ChannelMix(nn.Module):
    """A gated feed-forward network with a squared ReLU."""

    def __init__(self, config: RWKV6Config) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size or 0
        self.time_maa_k = ElementwiseScale(1, 1, hidden, first=1, last=0)
        self.time_maa_r = ElementwiseScale(1, 1, hidden, first=1, last=0)
        self.key = nn.Linear(hidden, inner, bias=False)
        self.receptance = nn.Linear(hidden, hidden, bias=False)
        self.value = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Mix ``[batch, tokens, hidden]``; ``before`` is the ``x`` of the token before."""
        dx = previous_tokens(x, before) - x
        inner = self.key(x + self.time_maa_k(dx)).relu().square()
        result: torch.Tensor = self.receptance(x + self.time_maa_r(dx)).sigmoid() * self.value(
            inner
        )
        return result


class RWKV6Block(nn.Module):
    """One layer: time mix, then channel mix, each after a norm and added to what came in."""

    def __init__(self, config: RWKV6Config, layer_index: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, config.hidden_size, eps=config.norm_eps)
        self.ln0 = norm() if layer_index == 0 else None
        self.ln1, self.ln2 = norm(), norm()
        self.att = RWKV6TimeMix(config)
        self.ffn = RWKV6ChannelMix(config)

    def forward(
        self,
        hidden: torch.Tensor,
        v_first: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        state: LayerState | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, LayerState]:
        """Return new ``[batch, tokens, hidden]``, ``v_first`` as it came, and the new state."""
        mask = token_mask(attention_mask, hidden)
        if self.ln0 is not None:
            hidden = self.ln0(hidden)
        if state is None:
            state = empty_state(hidden, self.att.num_heads)
        x = self.ln1(hidden) if mask is None else self.ln1(hidden) * mask
        mixed, wkv = self.att(x, mask, state.att_shift, state.wkv)
        hidden = hidden + mixed
        y = self.ln2(hidden) if mask is None else self.ln2(hidden) * mask
        hidden = hidden + self.ffn(y, state.ffn_shift)
        return hidden, v_first, LayerState(x[:, -1], wkv, y[:, -1])


class _RWKV6PreTrainedModel(RWKVPreTrainedModel):
    config_class = RWKV6Config
    block_class = RWKV6Block
    _no_split_modules = ["RWKV6Block"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize what transformers does not: the decays reach from long to short memory."""
        super()._init_weights(module)
        if isinstance(module, RWKV6TimeMix):
            decay = module.time_decay
            ramp = torch.linspace(-6, -1, decay.numel(), device=decay.device)
            init.copy_(decay, ramp.view_as(decay))
            init.constant_(module.time_faaaa, 0.5)


class RWKV6Model(_RWKV6PreTrainedModel, RWKVModel):
    """RWKV-6 without its head."""


class RWKV6ForCausalLM(_RWKV6PreTrainedModel, RWKVForCausalLM):
    """RWKV-6 that predicts the next token."""

    model_class = RWKV6Model
    version = 6
