"""One name for every module, whoever wrote the checkpoint, and the names that readers look up.

Our canonical name is that of the linearized transformers model, ``model.layers.0.mlp.experts.3.
gate_proj``. Mixtral's files and vLLM say ``block_sparse_moe`` and ``w1``, ``w3``, ``w2``.
"""

from __future__ import annotations

import re

_TO_OURS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_TO_MIXTRAL = {ours: theirs for theirs, ours in _TO_OURS.items()}
_EXPERT = re.compile(r"(.*\.experts\.\d+\.)(\w+)(.*)", re.DOTALL)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# what vLLM loads as one matrix, by its own name for it
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
_FUSED_INTO = {part: whole for whole, parts in FUSED.items() for part in parts}
# the suffixes of the tensors of one linear; a module's other tensors keep their name
_SUFFIXES = re.compile(
    r"(.+)\.(weight|bias|weight_packed|weight_scale|weight_zero_point|weight_shape|weight_g_idx|"
    r"weight_global_scale|input_scale|input_zero_point|input_global_scale|qweight|qzeros|scales|"
    r"g_idx)"
)


def split_tensor(name: str) -> tuple[str, str]:
    """Return a tensor's module and suffix; the suffix is empty for what is no linear's."""
    found = _SUFFIXES.fullmatch(name)
    return (found[1], found[2]) if found else (name, "")


def canonical(name: str) -> str:
    """Return our name of a module or tensor of a file.

    Example:
        >>> canonical("model.layers.0.block_sparse_moe.experts.3.w1")
        'model.layers.0.mlp.experts.3.gate_proj'
    """
    name = name.replace(".block_sparse_moe.", ".mlp.")
    expert = _EXPERT.fullmatch(name)
    if expert and expert[2] in _TO_OURS:
        return f"{expert[1]}{_TO_OURS[expert[2]]}{expert[3]}"
    return name


def in_file(name: str, family: str) -> str:
    """Return the name that ``save_pretrained`` gives to what is canonically called ``name``."""
    if family != "mixtral":
        return name
    expert = _EXPERT.fullmatch(name)
    if expert and expert[2] in _TO_MIXTRAL:
        name = f"{expert[1]}{_TO_MIXTRAL[expert[2]]}{expert[3]}"
    return name.replace(".mlp.", ".block_sparse_moe.")


def in_vllm(name: str, family: str) -> str:
    """Return vLLM's name of an unfused module."""
    if family == "gpt_oss":
        return name.replace(".self_attn.", ".attn.")
    return in_file(name, family)


def fused_name(name: str) -> str | None:
    """Return what vLLM calls the matrix that a module becomes a part of, ``None`` for none."""
    parent, _, projection = name.rpartition(".")
    whole = _FUSED_INTO.get(projection)
    return f"{parent}.{whole}" if whole and ".experts." not in name else None


def layer_of(name: str) -> int | None:
    """Return the number of the decoder layer that a module belongs to."""
    found = _LAYER.search(name)
    # a number of more digits is no layer, and int() would refuse thousands of them
    return int(found[1]) if found and len(found[1]) < 6 else None


def expert_of(name: str) -> int | None:
    """Return the number of the expert that a module belongs to."""
    found = re.search(r"\.experts\.(\d{1,6})\.", name)
    return int(found[1]) if found else None


def pool_of(name: str) -> str:
    """Return the name without the number of an expert: one role in one layer."""
    return re.sub(r"(\.experts)\.\d+\.", r"\1.*.", name)


def role_of(name: str) -> str:
    """Return the name without numbers: one role in all layers."""
    return re.sub(r"\.\d+\.", ".*.", name)
