"""A tiny random RWKV-7 with every kind of weight that the real one has."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moeq_plugin.core.codebook import CodebookFormat
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
# codebooks that fit these sizes, and settings of the modifier
FORM = CodebookFormat(4, 2, group_rows=32, group_columns=16)
ELEMENTWISE = CodebookFormat(3, 1, group_rows=1, group_columns=64)
ALL_IN_CODEBOOKS = {"scalar_frac": 0.0, "codebook": FORM}
# a layer has weights on grids, in codebooks and element by element
MIXED = {"scalar_frac": 0.5, "codebook": FORM, "elementwise": ELEMENTWISE}


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
