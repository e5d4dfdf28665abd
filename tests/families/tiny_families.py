"""A tiny random model of every Mixture-of-Experts family of transformers, described in ``tiny/``.

Each entry there says what a family needs beyond ``base.json``: widths differ on purpose (hidden 64,
dense MLP 96, experts 32), so that a wrong guess shows, and first dense layers, shared experts,
groups of experts and scaling factors are on where a family has them. ``auto`` is the class that a
user loads it with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_DIRECTORY = Path(__file__).parent / "tiny"
_BASE: dict[str, Any] = json.loads((_DIRECTORY / "base.json").read_text())
FAMILIES: dict[str, dict[str, Any]] = {
    name: entry
    for path in sorted(_DIRECTORY.glob("*.json"))
    if path.stem != "base"
    for name, entry in json.loads(path.read_text()).items()
}
VOCABULARY: int = _BASE["text_config"]["vocab_size"]


def config_of(name: str, **text: Any) -> Any:
    """Return the config of a tiny model, in float32; `text` changes that of its language model."""
    entry = FAMILIES[name]
    entry = {**entry, "text": {**entry.get("text", {}), **text}}
    cls = CONFIG_MAPPING[entry.get("model_type", name)]
    parts = cls.sub_configs or {}
    values = dict(entry.get("top", {}))
    without = entry.get("without", [])  # parts of a multi-modal model
    if "text_config" in parts:
        values |= fitting(cls, _special_ids(cls) | {"tie_word_embeddings": False} | values)
        for part in {"text_config", "vision_config", "audio_config"} & parts.keys() - {*without}:
            given = entry["text"] if part == "text_config" else entry.get(part, {})
            of = CONFIG_MAPPING[given["model_type"]] if parts[part] is AutoConfig else parts[part]
            values[part] = of(**fitting(of, _BASE[part]) | given)
    else:
        values |= fitting(cls, _BASE["text_config"]) | entry["text"]
    config = cls(**values)
    config.dtype = torch.float32
    return config


def save_tiny(name: str, directory: Path, *, seed: int = 0, **text: Any) -> PreTrainedModel:
    """Make and save a random model with a tokenizer, and return it as loaded.

    Args:
        name: of the family.
        directory: where to.
        seed: of the weights.
        **text: as for :func:`config_of`.
    """
    torch.manual_seed(seed)
    auto = getattr(transformers, FAMILIES[name].get("auto", "AutoModelForCausalLM"))
    model: PreTrainedModel = auto.from_config(config_of(name, **text)).float().eval()
    _randomize(model)
    model.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    return auto.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def _randomize(model: PreTrainedModel) -> None:
    """Draw weights: initializers make routers so flat that every expert looks alike."""
    for name, parameter in model.named_parameters():
        is_special = any(part in name for part in ("norm", "conv", "A_log"))
        if parameter.ndim > 1 and not is_special:
            is_router = "gate.weight" in name or "router" in name
            width = max(parameter.shape[-1], 16)
            parameter.normal_(0, (1.0 if is_router else 0.5) * width**-0.5)
        elif name.endswith("bias") or "sinks" in name or "correction_bias" in name:
            parameter.normal_(0, 0.1)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name or "expert_bias" in name:
            buffer.normal_(0, 0.1)
        elif name.endswith("tid2eid"):  # experts by token, each token's distinct
            num_experts = int(model.config.n_routed_experts)
            drawn = torch.rand(len(buffer), num_experts).argsort(1)
            buffer.copy_(drawn[:, : buffer.shape[1]])


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {str(number): number for number in range(VOCABULARY)}
    splitting = Tokenizer(models.WordLevel(words, "0"))
    splitting.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=splitting, model_max_length=64)


def fitting(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that a config class has a field for."""
    fields = {name for base in cls.__mro__ for name in getattr(base, "__annotations__", {})}
    return {key: value for key, value in values.items() if key in fields}


def _special_ids(cls: Any) -> dict[str, int]:
    """Return ids for the tokens that stand for images and sounds, which no text has."""
    fields = {name for base in cls.__mro__ for name in getattr(base, "__annotations__", {})}
    fields |= set(cls.attribute_map or {})
    special = sorted(
        name
        for name in fields
        if name.endswith(("_token_id", "_token_index")) and name[:3] not in {"bos", "eos", "pad"}
    )
    return {name: VOCABULARY - 1 - index for index, name in enumerate(special)}
