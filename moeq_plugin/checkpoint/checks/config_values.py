"""Are there values in a model's config with which it cannot run, or computes nothing of use?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from moeq_plugin.checkpoint.checks.findings import Finding, error
from moeq_plugin.checkpoint.config import EXPERT_KEYS, Config

_ACTIVATIONS = {
    "gelu", "gelu_10", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh",
    "gelu_python_tanh", "gelu_accurate", "hardswish", "laplace", "leaky_relu", "linear", "mish",
    "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "sqrtsoftplus", "swish", "swiglu",
    "geglu", "reglu", "swigluoai", "tanh", "prelu", "xielu",
}  # fmt: skip
_ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (), "mrope": (), "proportional": (), "su": (), "none": (), "deepseek_yarn": (),
    "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",), "ntk": ("factor",),
    "longrope": ("short_factor", "long_factor"), "deepseek_llama_scaling": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip
_DTYPES = {"float32", "float16", "bfloat16", "float64", "float", "half", "auto"}
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon", "norm_epsilon")
_MAX_EPSILON = 0.01  # beside a mean square of about 1
_POSITIVE = (
    "rope_theta", "max_position_embeddings", "vocab_size", "hidden_size",
    "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "routed_scaling_factor", "initializer_range",
    "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor", "n_group",
    "topk_group", "attention_multiplier", "logits_scaling", "residual_multiplier",
    "embedding_multiplier", "final_logit_softcapping", "attn_logit_softcapping",
)  # fmt: skip
_TOP_K = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_k", "moe_topk")
_LAYER_TYPES = (
    "attention", "conv", "moe", "sparse", "dense", "hybrid", "mamba", "linear", "recurrent",
)  # fmt: skip


def check_config_values(content: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield values that no model of this config can run with.

    Args:
        content: of ``config.json``.
    """
    model = Config(content).content
    for key, what in [*_numbers("", model), *_relations(model), *_words(model), *_ropes(model)]:
        yield error("config-value", f"config.json: {key}", what)


Problems = Iterator[tuple[str, str]]


def _numbers(prefix: str, content: Mapping[str, Any], depth: int = 0) -> Problems:
    """Yield numbers that are none, and sizes that are not positive, at any depth."""
    for key, value in content.items():
        if key in {"quantization_config", "vision_config", "audio_config"} or depth > 8:
            continue
        if isinstance(value, Mapping):
            yield from _numbers(f"{prefix}{key}.", value, depth + 1)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                yield f"{prefix}{key}", f"{number} is no number"
                break
        if key in _POSITIVE and value is not None and not isinstance(value, list | Mapping):
            if not _is_number(value):
                yield f"{prefix}{key}", f"a number was expected, got {ascii(value)[:60]}"
            elif value <= 0 and not _is_unturned(content, key):
                yield f"{prefix}{key}", f"must be positive, got {value}"
        if key in _EPSILONS and not _is_epsilon(content, value):
            yield f"{prefix}{key}", f"must be a small number, got {ascii(value)[:60]}"


def _is_unturned(content: Mapping[str, Any], key: str) -> bool:
    """Tell whether a size is that of the turned part of a head that turns none of itself.

    Configs of latent attention call it ``head_dim`` too; the sizes of heads have other keys.
    """
    return key == "head_dim" and content[key] == 0 and content.get("qk_rope_head_dim") == 0


def _is_epsilon(content: Mapping[str, Any], value: Any) -> bool:
    """Tell whether a value can be an epsilon; null where norms have another one can."""
    if value is None:
        return any(_is_number(content.get(key)) for key in _EPSILONS)
    return _is_number(value) and 0 <= value <= _MAX_EPSILON


def _relations(model: Mapping[str, Any]) -> Problems:
    """Yield counts that do not go together."""
    experts = _first(model, *EXPERT_KEYS, "moe_num_experts")
    top_k = _first(model, *_TOP_K)
    if experts and top_k is not None and not 1 <= top_k[1] <= experts[1]:
        yield top_k[0], f"{top_k[1]} of {experts[1]} experts for a token"
    if experts:
        yield from _expert_groups(model, experts[1], top_k[1] if top_k else 1)
    heads, keys = _first(model, "num_attention_heads"), _first(model, "num_key_value_heads")
    if heads and keys and keys[1] > 0 and heads[1] % keys[1]:
        yield keys[0], f"{heads[1]} query heads cannot share {keys[1]} key heads"
    hidden = _first(model, "hidden_size")
    has_head_size = any(model.get(k) for k in ("head_dim", "kv_lora_rank", "qk_rope_head_dim"))
    if hidden and heads and heads[1] > 0 and not has_head_size and hidden[1] % heads[1]:
        yield "num_attention_heads", f"{heads[1]} heads do not divide hidden_size {hidden[1]}"
    for key in ("head_dim", "qk_rope_head_dim"):
        if _first(model, key) and model[key] % 2:
            yield key, f"rotary embeddings turn pairs of columns, {model[key]} is odd"
    vocabulary = _first(model, "vocab_size")
    padding = _first(model, "pad_token_id")  # has a row of its own, the others only never come
    if vocabulary and padding and padding[1] >= vocabulary[1]:
        yield padding[0], f"{padding[1]} is not one of {vocabulary[1]} tokens"
    window = _first(model, "sliding_window")
    if window and window[1] < 0:
        yield window[0], f"must be positive, got {window[1]}"


def _expert_groups(model: Mapping[str, Any], experts: int, top_k: int) -> Problems:
    groups, chosen = _first(model, "n_group"), _first(model, "topk_group")
    if groups is None or groups[1] < 1:
        return
    if experts % groups[1]:
        yield "n_group", f"{experts} experts cannot be split into {groups[1]} groups"
    elif chosen is not None and chosen[1] > groups[1]:
        yield "topk_group", f"{chosen[1]} of {groups[1]} groups"
    elif chosen is not None and chosen[1] * (experts // groups[1]) < top_k:
        held = chosen[1] * (experts // groups[1])
        yield "topk_group", f"{chosen[1]} groups hold {held} experts, {top_k} are asked for"


def _words(model: Mapping[str, Any]) -> Problems:
    for key in ("hidden_act", "hidden_activation"):
        if model.get(key) is not None and model[key] not in tuple(_ACTIVATIONS):
            yield key, f"{ascii(model[key])[:60]} is no activation function"
    for key in ("dtype", "torch_dtype"):
        name = model.get(key)
        if name is not None and str(name).removeprefix("torch.") not in _DTYPES:
            yield key, f"{ascii(name)[:60]} is no dtype of a model"
    types, layers = model.get("layer_types"), _first(model, "num_hidden_layers")
    if isinstance(types, list):
        if layers and len(types) < layers[1]:
            yield "layer_types", f"{len(types)} entries for {layers[1]} layers"
        strange = [t for t in types if not any(word in str(t) for word in _LAYER_TYPES)]
        if strange:
            yield "layer_types", f"{ascii(strange[0])[:60]} is no kind of layer"


def _ropes(model: Mapping[str, Any]) -> Problems:
    for key in ("rope_scaling", "rope_parameters"):
        rope = model.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            yield key, f"an object was expected, got {ascii(rope)[:60]}"
            continue
        nested = [value for value in rope.values() if isinstance(value, Mapping)]
        for part in nested or [rope]:
            kind = part.get("rope_type", part.get("type", "default"))
            needed = _ROPE_NEEDS.get(kind) if isinstance(kind, str) else None
            if needed is None:
                yield f"{key}.rope_type", f"{ascii(kind)[:60]} is no kind of rotary embedding"
                continue
            absent = [name for name in needed if part.get(name) is None]
            if absent:
                yield key, f"{kind} needs {', '.join(absent)}"


def _first(model: Mapping[str, Any], *keys: str) -> tuple[str, int] | None:
    """Return the first of the keys that has an integer, and the integer."""
    for key in keys:
        if type(model.get(key)) is int:
            return key, model[key]
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
