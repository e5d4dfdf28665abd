"""Linears that stay in 16 bit for what they do, told by whole parts of their names.

They are small, and what they decide holds for all that follows: published recipes leave them alone.
The standard library only, as :mod:`moeq_plugin.core.names`.
"""

from __future__ import annotations

import re
from enum import StrEnum


class Kind(StrEnum):
    """What such a linear does."""

    STATE_GATE = "gate of a recurrent state"
    HEAD_GATE = "gate of attention heads"
    INDEXER = "indexer of sparse attention"
    COMPRESSOR = "compressor of keys and values"
    HYPER_CONNECTION = "hyper-connection"
    NORM = "part of a norm"
    PREDICTION = "next-token prediction"
    STATE_FACTOR = "low-rank factor that feeds a recurrent state"


_LAST = {
    # decays and step sizes of gated delta nets, of Kimi's linear attention and of Mamba
    "in_proj_a": Kind.STATE_GATE, "in_proj_b": Kind.STATE_GATE, "in_proj_ba": Kind.STATE_GATE,
    "b_proj": Kind.STATE_GATE, "f_a_proj": Kind.STATE_GATE, "f_b_proj": Kind.STATE_GATE,
    "dt_proj": Kind.STATE_GATE, "x_proj": Kind.STATE_GATE,
    "g_proj": Kind.HEAD_GATE,
}  # fmt: skip
# RWKV-7's decay, learning rate, value and gate; RWKV-6's decay and token shift, whose second factor
# is a list. Errors of a state add up from token to token
_STATE_FACTOR = re.compile(
    r"(?:.*\.)?att\.(?:[wavg][12]|time_maa_w[12](?:\.\d+)?|time_decay_w[12])"
)
_WITHIN = {"indexer": Kind.INDEXER, "compressor": Kind.COMPRESSOR, "mtp": Kind.PREDICTION}


def small_kind(name: str) -> Kind | None:
    """Return what a linear does that is left in 16 bit, ``None`` for all others.

    Example:
        >>> small_kind("model.layers.0.linear_attn.in_proj_b")
        <Kind.STATE_GATE: 'gate of a recurrent state'>
        >>> small_kind("model.layers.0.self_attn.indexer.wk")
        <Kind.INDEXER: 'indexer of sparse attention'>
        >>> small_kind("model.blocks.0.att.w1").value
        'low-rank factor that feeds a recurrent state'
    """
    if _STATE_FACTOR.fullmatch(name):
        return Kind.STATE_FACTOR
    *parents, last = name.split(".")
    if last in _LAST:
        return _LAST[last]
    for part in parents:
        if part in _WITHIN:
            return _WITHIN[part]
        if "hyper_connection" in part:
            return Kind.HYPER_CONNECTION
        if part.endswith("norm"):
            return Kind.NORM
    return None
