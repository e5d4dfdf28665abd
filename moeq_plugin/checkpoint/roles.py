"""What a linear does, told by whole parts of its name: a dense ``gate_proj`` is no router."""

from __future__ import annotations

import re

from moeq_plugin.checkpoint.architecture import Role
from moeq_plugin.core.names import expert_of
from moeq_plugin.core.small_linears import small_kind

_ROUTERS = {"gate", "router"}
# what a router's matrix may be called within a module that is the router
_INSIDE = {"layer", "proj", "linear", "wg", "classifier"}
_TIME_MIX = "att"  # RWKV's; neither an attention nor with a router called `gate`
_BLOCKS = {"mlp", "feed_forward", "ffn", "moe", "block_sparse_moe"}
_SHARED = {"shared_expert", "shared_experts", "shared_mlp"}

# tables of vectors that are looked up, which no scheme for linears means: GPT-2's and T5's names,
# and the learned queries of DeepSeek-OCR-2, one table for each size of an image; RWKV's embedding,
# and its matrices that are multiplied element by element
_TABLES = re.compile(r"wte|wpe|shared|relative_attention_bias|query_\d+|emb|r_k|time_faaaa")


def is_embedding(name: str) -> bool:
    """Tell whether a matrix is a table of vectors and no linear.

    Example:
        >>> is_embedding("model.embed_tokens"), is_embedding("transformer.wte")
        (True, True)
        >>> is_embedding("layers.0.mlp.shared_expert.up_proj")
        False
    """
    return "embed" in name or _TABLES.fullmatch(name.rpartition(".")[2]) is not None


def role_of_linear(name: str) -> Role:
    """Return the role of a linear of any family.

    Example:
        >>> role_of_linear("layers.0.mlp.gate"), role_of_linear("layers.0.mlp.gate_proj")
        (<Role.ROUTER: 'router'>, <Role.DENSE: 'dense MLP'>)
    """
    parts = name.split(".")
    if expert_of(name) is not None:
        return Role.EXPERT
    small = small_kind(name)
    if small is not None:
        return Role(small)
    if parts[-1] == "shared_expert_gate":
        return Role.SHARED_GATE
    if _SHARED.intersection(parts):
        return Role.SHARED
    is_attention = any("attn" in part or "attention" in part for part in parts)
    is_attention = is_attention or _TIME_MIX in parts
    if not is_attention and (
        parts[-1] in _ROUTERS or (parts[-1] in _INSIDE and _ROUTERS.intersection(parts[-2:-1]))
    ):
        return Role.ROUTER
    if is_attention:
        return Role.ATTENTION
    if parts[-1] == "lm_head":
        return Role.HEAD
    return Role.DENSE if _BLOCKS.intersection(parts) else Role.OTHER
