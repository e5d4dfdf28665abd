"""What serving a model takes beside its weights: the cache of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BYTES = 2  # of a cached number, in 16 bit


def cache_bytes_per_token(config: Mapping[str, Any]) -> int | None:
    """Return what one token of context takes, ``None`` where the config does not say.

    Sliding windows and layers without attention take less.

    Args:
        config: of a model, as ``config.json`` has it.

    Example:
        >>> cache_bytes_per_token(
        ...     {"num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128}
        ... )
        98304
    """
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config
    layers = _count(text, "num_hidden_layers")
    latent, rope = _count(text, "kv_lora_rank"), _count(text, "qk_rope_head_dim")
    if layers and latent:  # one compressed vector for keys and values of all heads
        return _BYTES * layers * (latent + rope)
    heads = _count(text, "num_key_value_heads") or _count(text, "num_attention_heads")
    queries = _count(text, "num_attention_heads")
    width = _count(text, "head_dim") or (_count(text, "hidden_size") // queries if queries else 0)
    return 2 * _BYTES * layers * heads * width or None


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else 0
