"""Tiny RWKV models whose every weight matters."""

from __future__ import annotations

from typing import Any

import torch

from moeq_plugin.rwkv import RWKV6Config, RWKV6ForCausalLM, RWKV7Config, RWKV7ForCausalLM

VERSIONS = ["rwkv6", "rwkv7"]
VOCABULARY = 61
_CONFIGS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "rwkv6": (RWKV6Config, RWKV6ForCausalLM, {"maa_low_rank_dim": 4}),
    "rwkv7": (
        RWKV7Config,
        RWKV7ForCausalLM,
        {"a_low_rank_dim": 6, "v_low_rank_dim": 4, "gate_low_rank_dim": 10},
    ),
}


def tiny_rwkv(version: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a random model in evaluation mode, none of whose weights is a constant."""
    config_class, model_class, sizes = _CONFIGS[version]
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "head_dim": 16}
    config = config_class(**{**common, "decay_low_rank_dim": 8, **sizes, **changes})
    torch.manual_seed(seed)
    model = model_class(config).eval()
    for parameter in model.parameters():
        scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
        parameter.data += scale * torch.randn(parameter.shape)
    return model


def rwkv_tokens(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Return ``[batch, length]`` random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)
