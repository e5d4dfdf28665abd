"""What transformers takes where a config of a known family does not say it, as far as it matters.

A config may leave out what its class has as a default, so two configs can only be compared with
these at hand. Only what changes the computation is here; a test compares it with transformers.
"""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_DEEPSEEK: dict[str, Any] = {
    **_COMMON, "attention_bias": False, "kv_lora_rank": 512, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
_QWEN: dict[str, Any] = {
    **_COMMON, "use_sliding_window": False, "decoder_sparse_step": 1, "norm_topk_prob": False,
    "mlp_only_layers": [],
}  # fmt: skip

# family -> key -> default; `rope_theta` is that of the default kind of rotary embedding
CONFIG_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {
        **_COMMON, "rms_norm_eps": 1e-5, "sliding_window": None, "num_experts_per_tok": 2,
        "rope_theta": 1e6,
    },
    "qwen2_moe": {**_QWEN, "num_experts_per_tok": 4, "qkv_bias": True, "rope_theta": 1e4},
    "qwen3_moe": {
        **_QWEN, "attention_bias": False, "num_experts_per_tok": 8, "sliding_window": None,
        "rope_theta": 1e4,
    },
    "olmoe": {
        **_COMMON, "rms_norm_eps": 1e-5, "attention_bias": False, "clip_qkv": None,
        "num_experts_per_tok": 8, "norm_topk_prob": False, "rope_theta": 1e4,
    },
    "deepseek_v2": {
        **_DEEPSEEK, "first_k_dense_replace": 0, "n_group": None, "topk_group": None,
        "n_shared_experts": 2, "routed_scaling_factor": 1.0, "topk_method": "greedy",
        "norm_topk_prob": False, "mlp_bias": False, "rope_theta": 1e4,
    },
    "deepseek_v3": {
        **_DEEPSEEK, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
        "n_shared_experts": 1, "routed_scaling_factor": 2.5, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "rope_interleave": True, "rope_theta": 1e4,
    },
    "gpt_oss": {
        **_COMMON, "rms_norm_eps": 1e-5, "sliding_window": 128, "num_experts_per_tok": 4,
        "attention_bias": True, "rope_theta": 150000.0,
    },
}  # fmt: skip
