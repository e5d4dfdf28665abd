"""A tiny random RWKV-7 with every kind of weight that the real one has."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moeq_plugin.rwkv import RWKV7Config

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "decay_low_rank_dim": 16,
    "a_low_rank_dim": 16,
    "v_low_rank_dim": 8,
    "gate_low_rank_dim": 32,
}


def tiny_rwkv(
    directory: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: int
) -> PreTrainedModel:
    """Make, save and load a random RWKV-7 whose element-wise weights all differ."""
    torch.manual_seed(seed)
    config = RWKV7Config(**{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # as heavy-tailed as trained ones
            noise = torch.randn_like(parameter)
            parameter.data += 0.1 * noise * noise.abs()
    model.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory)
