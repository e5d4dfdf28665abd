"""What a linear does, told by whole parts of its name: a dense ``gate_proj`` is no router."""

from __future__ import annotations

from moeq_plugin.checkpoint.architecture import Role
from moeq_plugin.core.names import expert_of

_ROUTERS = {"gate", "router"}
# what a router's matrix may be called within a module that is the router
_INSIDE = {"layer", "proj", "linear", "wg", "classifier"}
_BLOCKS = {"mlp", "feed_forward", "ffn", "moe", "block_sparse_moe"}
_SHARED = {"shared_expert", "shared_experts", "shared_mlp"}


def role_of_linear(name: str) -> Role:
    """Return the role of a linear of any family.

    Example:
        >>> role_of_linear("layers.0.mlp.gate"), role_of_linear("layers.0.mlp.gate_proj")
        (<Role.ROUTER: 'router'>, <Role.DENSE: 'dense MLP'>)
    """
    parts = name.split(".")
    if expert_of(name) is not None:
        return Role.EXPERT
    if parts[-1] == "shared_expert_gate":
        return Role.SHARED_GATE
    if _SHARED.intersection(parts):
        return Role.SHARED
    is_attention = any("attn" in part or "attention" in part for part in parts)
    if not is_attention and (
        parts[-1] in _ROUTERS or (parts[-1] in _INSIDE and _ROUTERS.intersection(parts[-2:-1]))
    ):
        return Role.ROUTER
    if is_attention:
        return Role.ATTENTION
    if parts[-1] == "lm_head":
        return Role.HEAD
    return Role.DENSE if _BLOCKS.intersection(parts) else Role.OTHER
