"""Tiny models of seven families, and what a user would do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 128
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_DEEPSEEK: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "routed_scaling_factor": 2.5,
}
_QWEN: dict[str, Any] = {
    **_COMMON,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**_QWEN, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": {**_COMMON, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**_DEEPSEEK, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_DEEPSEEK, "n_group": 2, "topk_group": 1},
    "gpt_oss": {
        **_COMMON,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
    },
}


def tiny_model(family: str, directory: Path, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Make, save and load a random model of ``family`` in float32.

    Saved and loaded because the host reads its path, and because saving is what users do.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # initializers make routers so flat that every expert looks alike
            torch.nn.init.normal_(parameter, std=0.5 if "norm" not in name else 0.1)
            parameter.data *= parameter.shape[-1] ** -0.5
    model.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def uneven_model(
    family: str, directory: Path, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """Return a tiny model whose norms and biases are not the ones and zeros of a fresh one."""
    tiny_model(family, directory, **changes)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        elif "bias" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of 48 random tokens."""
    return model(tokens(2, 24).to(model.device)).logits


def change(after: torch.Tensor, before: torch.Tensor) -> float:
    """Return the size of the difference relative to the size of ``before``."""
    return ((after - before).norm() / before.norm()).item()


def tokens(num_sequences: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Return ``[num_sequences, length]`` random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (num_sequences, length), generator=generator)


def dataset(num_sequences: int = 8, length: int = 32, *, seed: int = 0) -> Dataset:
    """Return a tokenized data set of random token ids."""
    return Dataset.from_dict({"input_ids": tokens(num_sequences, length, seed=seed).tolist()})


class NoProcessor:
    """Stands for a tokenizer where token ids are all there is."""

    def save_pretrained(self, directory: str) -> None:
        """Write nothing."""


def int4(group_size: int | None = 32, *, symmetric: bool = True, num_bits: int = 4) -> dict:
    """Return ``config_groups`` for integer weights of all linears."""
    weights = {"num_bits": num_bits, "type": "int", "symmetric": symmetric}
    weights |= (
        {"strategy": "group", "group_size": group_size} if group_size else {"strategy": "channel"}
    )
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


def oneshot(model: PreTrainedModel, recipe: Any, data: Any = None, **arguments: Any) -> None:
    """Call the host the way a user with token ids would."""
    from llmcompressor import oneshot as host

    arguments = {"processor": NoProcessor(), "shuffle_calibration_samples": False, **arguments}
    host(model=model, recipe=recipe, dataset=dataset() if data is None else data, **arguments)
