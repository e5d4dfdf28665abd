"""Tiny checkpoints for vLLM, and what they compute according to transformers."""

import json
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

VOCABULARY = 512
PROJECTIONS = {"w1": "gate", "w3": "up", "w2": "down"}  # Mixtral's names for them
SIGNED = {"scale_search": "narrow", "signed_scales": True}  # scales of both signs
# What the modifier is asked for, by the words behind a case's family.
WISHES = {
    "": {"scheme": "W4A16"},
    "rotated and smoothed": {"scheme": "W4A16"},
    # one layer in 16 bit, the others in groups of both sizes
    "allocated": {
        "bits_per_weight": 7.15,
        "options": ["W4A16", "W4A16_G64", "UNQUANTIZED"],
        "ignore": ["re:.*self_attn.*", "lm_head"],
    },
    # int4, 16 bit, int4, W8A8
    "allocated W8A8": {
        "bits_per_weight": 8.6,
        "options": ["W4A16", "W4A16_G64", "W8A8", "UNQUANTIZED"],
        "ignore": ["re:.*self_attn.*", "lm_head"],
    },
    "signed": {"scheme": "W4A16", **SIGNED},
}
WISHES["allocated W8A8 signed"] = {**WISHES["allocated W8A8"], **SIGNED}
# How large the experts' outputs are, by layer. W8A8 loses so little that a budget for 16 bit in one
# layer leaves none at 4, unless errors cost much more in one layer than in another. It gets the
# last layer: what noise does to its rounding, no other layer can amplify.
OUTPUTS = dict.fromkeys(("allocated W8A8", "allocated W8A8 signed"), [1 / 32, 8, 1 / 32, 1])


@dataclass(frozen=True)
class Checkpoint:
    """One tiny model in its three forms on disk."""

    original: Path  # 16 bit
    quantized: Path  # as our users hand it to vLLM
    dequantized: Path  # plain weights with the values that the quantized one stands for


def quantized_checkpoint(case: str, tmp_path: Path) -> Checkpoint:
    """Write a random model of the case's family, quantized as its other words wish."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    from moeq_plugin import MoEQuantAWQModifier, MoEQuantModifier
    from moeq_plugin.integrations.llm_compressor import ResidualRotationModifier

    family, _, wish = case.partition(" ")
    files = Checkpoint(*(tmp_path / form for form in ("original", "quantized", "dequantized")))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.bfloat16)
    for layer, factor in zip(model.model.layers, OUTPUTS.get(wish, []), strict=False):
        layer.mlp.experts.down_proj.data *= factor
    tokenizer = tiny_tokenizer()
    for saved in (model, tokenizer):
        saved.save_pretrained(files.original)
    model = AutoModelForCausalLM.from_pretrained(files.original, dtype=torch.bfloat16)
    ids = random_ids(samples=8, length=64, seed=0)
    recipe = [MoEQuantModifier(**WISHES[wish])]
    if wish == "rotated and smoothed":
        recipe = [ResidualRotationModifier(), MoEQuantAWQModifier(), *recipe]
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 64] * 8}),
        recipe=recipe,
        num_calibration_samples=8,
        max_seq_length=64,
    )
    for saved in (model, tokenizer):
        saved.save_pretrained(files.quantized)
    write_dequantized(files)
    return files


def tiny_config(family: str):
    """Four layers of four or eight experts; every dimension is a multiple of the group, 128."""
    from transformers import AutoConfig

    experts = {"num_experts": 8, "moe_intermediate_size": 128, "intermediate_size": 256}
    own = {
        "mixtral": {"num_local_experts": 4, "intermediate_size": 256},
        "qwen3_moe": experts | {"head_dim": 64},
        "qwen2_moe": experts | {"shared_expert_intermediate_size": 256},
        "olmoe": {"num_experts": 8, "intermediate_size": 128, "eos_token_id": 0},
        "llama": {"intermediate_size": 256},
    }
    return AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.05,
        **own[family],
    )


def tiny_tokenizer():
    """One token per number: llm-compressor wants a tokenizer beside the data."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0")


def random_ids(samples: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (samples, length), generator=generator).tolist()


def write_dequantized(files: Checkpoint) -> None:
    """Write the original with every quantized weight replaced by the value it is decoded to."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    quantized = load_file(files.quantized / "model.safetensors")
    tensors = load_file(files.original / "model.safetensors")
    for name in tensors:
        stem = name.removesuffix(".weight")
        for mixtral, common in PROJECTIONS.items():
            if f"{stem}.weight_scale" not in quantized:  # stock llm-compressor renames Mixtral's
                stem = re.sub(rf"{mixtral}$", f"{common}_proj", stem)
        scale = quantized.get(f"{stem}.weight_scale")
        if scale is None:
            tensors[name] = quantized[name]
        elif f"{stem}.weight_packed" in quantized:
            codes = unpack_from_int32(quantized[f"{stem}.weight_packed"], 4, tensors[name].shape)
            group = codes.shape[1] // scale.shape[1]
            tensors[name] = codes.to(scale.dtype) * scale.repeat_interleave(group, dim=1)
        else:  # int8, whose products are scaled in float32
            tensors[name] = quantized[f"{stem}.weight"].float() * scale.float()
    shutil.copytree(files.original, files.dequantized)
    save_file(tensors, files.dequantized / "model.safetensors", {"format": "pt"})


def reference_logprobs(
    files: Checkpoint, prompts: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what transformers computes in float32: of the quantized checkpoint, of its weights.

    They differ where inputs are quantized too.
    """
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        files.dequantized, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report  # transformers only warns, and fills in noise
    weights = logprobs_of(model, prompts)
    rounds = round_inputs(model, files.quantized)
    return (logprobs_of(model, prompts) if rounds else weights), weights


@torch.no_grad()
def logprobs_of(model: torch.nn.Module, prompts: list[list[int]]) -> torch.Tensor:
    return model(torch.tensor(prompts)).logits[:, :-1].double().log_softmax(-1)


def round_inputs(model: torch.nn.Module, checkpoint: Path) -> int:
    """Let linears see inputs as compressed-tensors quantizes them; return how many do."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import match_named_modules
    from llmcompressor.modeling.moe.linearize import linearize_moe

    linearize_moe(model)
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(config)
    hooks = [
        linear.register_forward_pre_hook(partial(rounded_input, args=group.input_activations))
        for group in config.config_groups.values()
        if group.input_activations is not None
        for _, linear in match_named_modules(model, group.targets, config.ignore)
    ]
    return len(hooks)


def rounded_input(linear: torch.nn.Module, inputs: tuple[torch.Tensor], args) -> torch.Tensor:
    from compressed_tensors.quantization import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    # Experts see [tokens, columns], which compressed-tensors 0.19 would give one scale in all.
    tokens = inputs[0].reshape(1, -1, inputs[0].shape[-1])
    scale, zero_point = compute_dynamic_scales_and_zp(tokens, args, linear)
    return fake_quantize(tokens, scale, zero_point, args).reshape(inputs[0].shape)
