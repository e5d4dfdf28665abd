"""Does the checkpoint's config compute what the source's does?"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from moeq_plugin.checkpoint.checks.findings import Finding, error
from moeq_plugin.checkpoint.config import EXPERT_KEYS, Config
from moeq_plugin.checkpoint.config_defaults import CONFIG_DEFAULTS

# what says nothing about the computation of a trained model, or says it for others
_IGNORED = {
    "quantization_config", "compression_config", "sparsity_config", "dtype", "torch_dtype",
    "transformers_version", "_name_or_path", "name_or_path", "use_cache", "attention_dropout",
    "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "initializer_range",
    "router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "output_router_logits",
    "router_jitter_noise", "input_jitter_noise", "output_hidden_states", "output_attentions",
    "return_dict", "use_return_dict", "problem_type", "id2label", "label2id", "finetuning_task",
    "task_specific_params", "torchscript", "pruned_heads", "auto_map", "_attn_implementation",
    "attn_implementation", "_attn_implementation_autoset", "experts_implementation",
    "chunk_size_feed_forward", "gradient_checkpointing", "pretraining_tp", "ep_size",
    "pad_token_id", "unsloth_version", "unsloth_fixed", "torch_compile", "is_decoder",
    "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size",
    "tie_encoder_decoder", "use_bfloat16", "num_nextn_predict_layers", "max_length", "min_length",
    "do_sample", "temperature", "top_k", "top_p", "num_beams", "repetition_penalty", "num_experts",
    "num_local_experts", "n_routed_experts", "rope_theta", "rope_scaling", "rope_parameters",
    "text_config", "head_dim", "num_key_value_heads", "layer_types", "max_window_layers",
    "qk_head_dim", "default_theta", "partial_rotary_factor",
}  # fmt: skip
_EXPERTS, _ROPE = "number of experts", "rope_parameters"
_SAME_AS_ABSENT: tuple[Any, ...] = (None, False, 0, 1, "", [], {})
_ROPE_ALWAYS = ("rope_theta", "rope_type", "factor")


def check_config_changes(
    content: Mapping[str, Any],
    source: Mapping[str, Any],
    changed: Collection[str] = (),
) -> Iterator[Finding]:
    """Yield keys that change the computation and differ, with both values.

    Args:
        content: of the checkpoint's ``config.json``.
        source: of the source's.
        changed: ``experts`` if some were removed, ``ties`` if the output embedding got a weight of
            its own.
    """
    here, there = Config(content), Config(source)
    defaults = CONFIG_DEFAULTS.get(there.family, {})
    pairs = [(here.content, there.content, defaults)]
    if here.content is not content and there.content is not source:
        pairs.append((content, source, {}))
    for one, other, default in pairs:
        for key, ours, theirs in _differences(one, other, default):
            if key == _EXPERTS and "experts" in changed:
                continue
            if key == "tie_word_embeddings" and "ties" in changed and not ours:
                continue
            what = f"{_short(ours)}, in the source {_short(theirs)}"
            yield error("config-change", f"config.json: {key}", what)


def _differences(
    one: Mapping[str, Any], other: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*one, *other} - _IGNORED):
        if key not in other and key not in defaults:
            continue  # added when it was saved: the default of its class
        ours, theirs = (_plain(values.get(key, defaults.get(key))) for values in (one, other))
        if key not in one and key not in defaults and theirs in _SAME_AS_ABSENT:
            continue
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            for inner, our, their in _differences(ours, theirs, {}):
                yield f"{key}.{inner}", our, their
        elif ours != theirs:
            yield key, one.get(key, ours), theirs
    yield from _derived(one, other)
    yield from _rope(one, other, defaults)


def _derived(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Compare what goes by several names, or follows from something else where it is not said."""
    for name, of in ((_EXPERTS, _experts), ("head_dim", _head_dim), ("num_key_value_heads", _keys)):
        ours, theirs = of(one), of(other)
        if ours != theirs and theirs is not None:
            yield name, ours, theirs
    for key in ("layer_types", "max_window_layers"):
        if one.get(key) is not None and other.get(key) is not None and one[key] != other[key]:
            yield key, one[key], other[key]


def _experts(content: Mapping[str, Any]) -> Any:
    return next((content[key] for key in EXPERT_KEYS if content.get(key) is not None), None)


def _head_dim(content: Mapping[str, Any]) -> Any:
    if content.get("qk_rope_head_dim") is not None:  # DeepSeek's says nothing of its own
        return None
    stated, hidden = content.get("head_dim"), content.get("hidden_size")
    heads = content.get("num_attention_heads")
    if stated is None and type(hidden) is int and type(heads) is int and heads:
        return hidden // heads
    return stated


def _keys(content: Mapping[str, Any]) -> Any:
    keys = content.get("num_key_value_heads")
    return content.get("num_attention_heads") if keys is None else keys


def _rope(
    one: Mapping[str, Any], other: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    ours, theirs = (_rope_of(content, defaults) for content in (one, other))
    for key in sorted({*ours, *theirs}):
        both = key in ours and key in theirs
        if (both or key in _ROPE_ALWAYS) and ours.get(key) != theirs.get(key):
            yield f"{_ROPE}.{key}", ours.get(key), theirs.get(key)


def _rope_of(content: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of rotary embeddings, wherever this version of a config has them."""
    found: dict[str, Any] = {"rope_type": "default"}
    if "rope_theta" in defaults:
        found["rope_theta"] = defaults["rope_theta"]
    for key in ("rope_theta", "partial_rotary_factor", "rope_scaling", "rope_parameters"):
        value = content.get(key)
        if isinstance(value, Mapping):
            found |= {k: v for k, v in value.items() if v is not None}
        elif value is not None:
            found[key] = value
    kind = found.pop("type", None)
    if kind is not None and found["rope_type"] == "default":
        found["rope_type"] = kind
    return found


def _plain(value: Any) -> Any:
    """Return a list of one token as the token."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
