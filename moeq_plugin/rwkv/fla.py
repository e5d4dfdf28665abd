"""RWKV-7 folders as flash-linear-attention writes them, the form in which most are published.

Its names are those of other transformers models (``model.layers.0.attn.r_proj``), its low-rank
matrices are linears with a bias. They are renamed to the official names and read as such
(:mod:`moeq_plugin.rwkv.official`).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

_MARK = "model.embeddings.weight"
_PARTS = {
    "model.embeddings.": "emb.",
    "model.norm.": "ln_out.",
    "lm_head.": "head.",
    "model.layers.": "blocks.",
    ".pre_norm.": ".ln0.",
    ".attn_norm.": ".ln1.",
    ".ffn_norm.": ".ln2.",
    ".attn.": ".att.",
    ".r_proj.": ".receptance.",
    ".k_proj.": ".key.",
    ".v_proj.": ".value.",
    ".o_proj.": ".output.",
    ".g_norm.": ".ln_x.",
}
_LOW_RANK = re.compile(r"(.*\.[wavg])_lora\.lora\.(0\.weight|2\.weight|2\.bias)")
_LOW_RANK_INDEX = {"0.weight": "1", "2.weight": "2", "2.bias": "0"}


def is_fla_folder(path: str | Path) -> bool:
    """Return whether ``path`` is a local folder with tensors in flash-linear-attention's names."""
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            if _MARK in tensors.keys():  # noqa: SIM118
                return True
    return False


def read_fla_folder(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a local folder by official name, in official shapes."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            official, is_transposed = _official_name(name)
            tensors[official] = tensor.T if is_transposed else tensor
    return tensors


def _official_name(name: str) -> tuple[str, bool]:
    for old, new in _PARTS.items():
        name = name.replace(old, new)
    if match := _LOW_RANK.fullmatch(name):
        return match[1] + _LOW_RANK_INDEX[match[2]], match[2].endswith("weight")
    return name, False
