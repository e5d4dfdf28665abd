"""Official RWKV-6 and RWKV-7 checkpoints (``.pth``): their names, shapes and sizes, both ways.

An official low-rank factor is multiplied from the right (``x @ w1``) and therefore the transpose
of an ``nn.Linear``'s weight; the five ``time_maa_w2`` of RWKV-6 are one tensor. Files differ in
whether vectors have leading ones, which is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from moeq_plugin.rwkv.modeling import RWKVForCausalLM
from moeq_plugin.rwkv.rwkv6 import RWKV6Config, RWKV6ForCausalLM
from moeq_plugin.rwkv.rwkv7 import RWKV7Config, RWKV7ForCausalLM

Tensors = Mapping[str, torch.Tensor]

_LOW_RANK = re.compile(r"(.*\.att\.(?:[wavg][12]|time_maa_w1|time_decay_w[12]))\.weight")
_ELEMENTWISE = re.compile(r"(.*\.(?:x_[rwkvag]|k_[ka]|r_k|time_maa_[xwkvrg]))\.weight")
_STACKED = "time_maa_w2"
_PART = re.compile(rf"(.*\.att\.{_STACKED})\.(\d)\.weight")
_UNUSED = {f"blocks.0.att.v{index}" for index in range(3)}  # some files have them, no model does
_MOST_NAMES = 60


def to_official(state_dict: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors of a model of ours under official names, as an official file has them."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        official, _, is_transposed = _official_name(name)
        parts.setdefault(official, []).append(tensor.T if is_transposed else tensor)
    return {
        name: (torch.stack(part) if name.endswith(_STACKED) else part[0]).contiguous()
        for name, part in parts.items()
    }


def from_official(tensors: Tensors, *, dtype: torch.dtype | None = None) -> RWKVForCausalLM:
    """Build the model that official tensors belong to.

    Args:
        tensors: by official name; sizes are read from their shapes.
        dtype: of the model; ``None`` for that of the embedding.

    Returns:
        An RWKV-6 or RWKV-7 in evaluation mode, with copies of the tensors.

    Raises:
        ValueError: if tensors are missing, unknown or of another shape; all are listed.
    """
    is_6 = "blocks.0.att.time_maa_w1" in tensors
    model_class = RWKV6ForCausalLM if is_6 else RWKV7ForCausalLM
    config = _read_config_6(tensors) if is_6 else _read_config_7(tensors)
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    wanted = {_official_name(name)[0] for name in expected}
    given = set(tensors) - _UNUSED
    if wanted != given:
        raise ValueError(
            f"these tensors are no RWKV-{6 if is_6 else 7} of {config.num_hidden_layers} layers "
            f"and {config.hidden_size} channels. Missing: {_listing(wanted - given)}. "
            f"Unexpected: {_listing(given - wanted)}"
        )
    state_dict, misshapen = {}, []
    for name, parameter in expected.items():
        official, part, is_transposed = _official_name(name)
        tensor = tensors[official] if part is None else tensors[official][part]
        tensor = tensor.T if is_transposed else tensor
        if tensor.squeeze().shape != parameter.squeeze().shape:
            misshapen.append(f"{official} {list(tensors[official].shape)}")
            continue
        state_dict[name] = tensor.reshape(parameter.shape).clone()
    if misshapen:
        raise ValueError(f"these tensors do not fit the sizes of the others: {misshapen}")
    model = model_class(config)
    model.load_state_dict(state_dict)
    module: nn.Module = model  # transformers' own `to` and `eval` are untyped
    module.to(tensors["emb.weight"].dtype if dtype is None else dtype).eval()
    return model


def load_pth(path: str | Path, *, dtype: torch.dtype | None = None) -> RWKVForCausalLM:
    """Load an official ``.pth`` file; see :func:`from_official`."""
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return from_official(tensors, dtype=dtype)


def _official_name(name: str) -> tuple[str, int | None, bool]:
    """Return the official name, the index in a stacked tensor, and whether it is transposed."""
    name = name.removeprefix("model.").replace("lm_head.", "head.")
    if match := _PART.fullmatch(name):
        return match[1], int(match[2]), True
    if match := _LOW_RANK.fullmatch(name):
        return match[1], None, True
    if match := _ELEMENTWISE.fullmatch(name):
        return match[1], None, False
    return name, None, False


def _read_config_7(tensors: Tensors) -> PreTrainedConfig:
    vocabulary, hidden, layers = _read_sizes(tensors)
    return RWKV7Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        head_dim=_size(tensors, "blocks.0.att.r_k", 1, hidden),
        intermediate_size=_size(tensors, "blocks.0.ffn.key.weight", 0, 4 * hidden),
        decay_low_rank_dim=_size(tensors, "blocks.0.att.w1", 1, 1),
        a_low_rank_dim=_size(tensors, "blocks.0.att.a1", 1, 1),
        v_low_rank_dim=_size(tensors, "blocks.1.att.v1", 1, 1),
        gate_low_rank_dim=_size(tensors, "blocks.0.att.g1", 1, 1),
    )


def _read_config_6(tensors: Tensors) -> PreTrainedConfig:
    vocabulary, hidden, layers = _read_sizes(tensors)
    return RWKV6Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        head_dim=_size(tensors, "blocks.0.att.time_faaaa", -1, hidden),
        intermediate_size=_size(tensors, "blocks.0.ffn.key.weight", 0, 4 * hidden),
        maa_low_rank_dim=_size(tensors, "blocks.0.att.time_maa_w1", 1, 5) // 5,
        decay_low_rank_dim=_size(tensors, "blocks.0.att.time_decay_w1", 1, 1),
    )


def _read_sizes(tensors: Tensors) -> tuple[int, int, int]:
    """Return vocabulary, channels and layers; 1 where a file of another layout tells nothing."""
    indices = [int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")]
    vocabulary = _size(tensors, "emb.weight", 0, 1)
    return vocabulary, _size(tensors, "emb.weight", 1, 1), max(indices, default=0) + 1


def _size(tensors: Tensors, name: str, dimension: int, default: int) -> int:
    return tensors[name].shape[dimension] if name in tensors else default


def _listing(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_MOST_NAMES]) or "none"
    return shown + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")
