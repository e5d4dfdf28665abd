"""Tiny multi-modal MoE models: text and a tower that sees."""

from pathlib import Path

import torch
from helpers import VOCABULARY
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 64, "num_experts": 4,
    "num_experts_per_tok": 2, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4,
    "out_hidden_size": 64, "num_position_embeddings": 16,
}  # fmt: skip
IDS = {
    "image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102,
    "vision_end_token_id": 103,
}  # fmt: skip
# experts of the first are stored one by one, of the second in one tensor per layer
MULTI_MODAL = {
    "qwen3_5_moe": (
        {
            "shared_expert_intermediate_size": 64, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": {
                "rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
            },
        },
        {},
    ),
    "qwen3_vl_moe": (
        {
            "intermediate_size": 64,
            "rope_parameters": {
                "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4,
            },
        },
        {"deepstack_visual_indexes": [0]},
    ),
}  # fmt: skip


def save_multi_modal(family: str, directory: Path) -> PreTrainedModel:
    """Make and save a random model in float32."""
    torch.manual_seed(0)
    text, vision = MULTI_MODAL[family]
    config = AutoConfig.for_model(
        family, text_config=TEXT | text, vision_config=VISION | vision, tie_word_embeddings=False,
        **IDS,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "conv" not in name:
            torch.nn.init.normal_(parameter, std=0.5 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(directory)
    return model
