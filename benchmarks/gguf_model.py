"""Write a Qwen3-MoE checkpoint as GGUF, for llama.cpp's own library.

Users convert with llama.cpp's `convert_hf_to_gguf.py`, which no package carries. Names come from
gguf-py's tensor maps, experts are stacked as llama.cpp holds them, and there is no tokenizer:
llama.cpp is given tokens.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

ARCHITECTURE = gguf.MODEL_ARCH.QWEN3MOE
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def write_gguf(model: Path, out: Path) -> None:
    """Write the model; matrices as stored, in bfloat16, norms and routers in float32."""
    config = json.loads((model / "config.json").read_text())
    names = gguf.get_tensor_name_map(ARCHITECTURE, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
    _write_metadata(writer, config)
    for name, tensor in _stacked(load_file(model / "model.safetensors")).items():
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, name
        # what llama.cpp's converter keeps in float32
        is_small = tensor.ndim == 1 or "ffn_gate_inp" in found
        if is_small:
            writer.add_tensor(found, tensor.float().numpy())
        else:
            values = gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(found, values, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Return all tensors of a file, dequantized, by llama.cpp's names."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


@torch.no_grad()
def put_in(model: PreTrainedModel, path: Path) -> None:
    """Give a model with fused experts the weights of a file, dequantized; changed in place."""
    names = gguf.get_tensor_name_map(ARCHITECTURE, model.config.num_hidden_layers)
    stored = read_weights(path)
    for name, parameter in model.named_parameters():
        parts = (name.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj"))
        wanted = parts if "gate_up_proj" in name else (name,)
        found = [
            stored[f"{names.get_name(part.removesuffix('.weight'))}.weight"] for part in wanted
        ]
        # gate and up of an expert are one parameter
        parameter.copy_(torch.from_numpy(np.concatenate(found, axis=-2 if len(found) > 1 else 0)))


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors, those of a layer's experts as one, named without their numbers."""
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    found = {}
    for name, tensor in tensors.items():
        expert = _EXPERT.search(name)
        if expert is None:
            found[name] = tensor
        else:
            stacks.setdefault(_EXPERT.sub(".experts.", name), {})[int(expert[1])] = tensor
    return found | {
        name: torch.stack([stack[i] for i in sorted(stack)]) for name, stack in stacks.items()
    }


def _write_metadata(writer: gguf.GGUFWriter, config: dict[str, object]) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
