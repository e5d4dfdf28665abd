"""Read the numbers of a model's config, and refuse what cannot be one before anything uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = (
    "num_experts_per_tok", "experts_per_token", "top_k", "moe_k", "moe_topk", "moe_top_k",
    "top_k_experts",
)  # fmt: skip
SHARED_KEYS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
PREDICTION_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
_MAX_SIZE = 1 << 24


class Config:
    """Typed access to a model's config.

    Args:
        content: of ``config.json``.

    Attributes:
        content: of it; of its ``text_config`` where the model has several parts.
        is_part: whether it is that of one of several parts.
        family: the model type.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        nested = content.get("text_config")
        self.is_part = isinstance(nested, dict) and "num_hidden_layers" not in content
        self.content = nested if isinstance(nested, dict) and self.is_part else content
        family = self.content.get("model_type")
        if not isinstance(family, str) or not family.isprintable():
            raise ValueError(f"config.json: model_type must be a name, got {_short(family)}")
        self.family = family

    def count(self, *keys: str, default: int | None = None, high: int = _MAX_SIZE) -> int:
        """Return the first of these entries that is there and not null.

        Raises:
            ValueError: if there is none and no default, or it is not an integer from 0 to ``high``.
        """
        for key in keys:
            value = self.content.get(key)
            if value is None:
                continue
            if type(value) is not int or not 0 <= value <= high:
                raise ValueError(
                    f"config.json: {key} must be an integer from 0 to {high}, got {_short(value)}"
                )
            return value
        if default is None:
            raise ValueError(f"config.json: {' or '.join(keys)} is missing")
        return default

    def size(self, *keys: str, default: int | None = None, high: int = _MAX_SIZE) -> int:
        """Return a count that has to be positive.

        Raises:
            ValueError: if it is not.
        """
        value = self.count(*keys, default=default, high=high)
        if not value:
            raise ValueError(f"config.json: {' or '.join(keys)} must be positive")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return a switch.

        Raises:
            ValueError: if the entry is not true, false or null.
        """
        value = self.content.get(key)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"config.json: {key} must be true or false, got {_short(value)}")
        return default if value is None else value

    def numbers(self, key: str) -> list[int]:
        """Return a list of numbers, empty if there is none.

        Raises:
            ValueError: if the entry is something else.
        """
        value = self.content.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(type(number) is int for number in value):
            raise ValueError(f"config.json: {key} must be a list of numbers, got {_short(value)}")
        return value


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
