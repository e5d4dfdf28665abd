"""Sound checkpoints of all kinds, and ways to damage a copy of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from helpers import FAMILIES, int4, oneshot, tiny_model
from safetensors.torch import load_file, save_file

MIXED = {
    "group_0": {
        **int4(16)["group_0"],
        "targets": [r"re:.*layers\.0\.(mlp|block_sparse_moe)\.experts.*"],
    },
    "group_1": {
        **int4(None, num_bits=8)["group_0"],
        "targets": [r"re:.*layers\.1\.(mlp|block_sparse_moe)\.experts.*"],
    },
}
SIGNED = {"preset": "balanced", "signed_scales": True}
# what MoEQuantModifier is asked for, by name of the checkpoint: (family, arguments)
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {"config_groups": int4(16)}) for family in FAMILIES},
    "asymmetric": ("qwen3_moe", {"config_groups": int4(16, symmetric=False)}),
    "3-bit": ("mixtral", {"config_groups": int4(16, num_bits=3)}),
    "8-bit channels": ("deepseek_v2", {"config_groups": int4(None, num_bits=8)}),
    "activations": ("olmoe", {"scheme": "W8A8"}),
    "8-bit floats": ("qwen3_moe", {"scheme": "FP8_DYNAMIC"}),
    "signed": ("qwen3_moe", {"config_groups": int4(16), **SIGNED}),
    "signed, 2 bit": ("mixtral", {"config_groups": int4(16, num_bits=2), **SIGNED}),
    "signed, 8 bit": ("deepseek_v2", {"config_groups": int4(None, num_bits=8), **SIGNED}),
    "mixed": ("mixtral", {"config_groups": MIXED}),
    "allocated": (
        "qwen2_moe",
        {"bits_per_weight": 5.5, "options": ["W3A16_G16", "W4A16_G16", "W8A16_G16"]},
    ),
    "a layer in 16 bit": (
        "qwen3_moe",
        {"config_groups": int4(16), "ignore": ["lm_head", r"re:.*layers\.1\.mlp\.experts.*"]},
    ),
}


def make_checkpoint(name: str, directory: Path) -> None:
    """Write the 16-bit model into ``directory / "model"``, the checkpoint into ``"out"``."""
    from moeq_plugin import MoEQuantModifier

    family, arguments = RECIPES[name]
    model = tiny_model(family, directory / "model")
    oneshot(model, MoEQuantModifier(**{"ignore": ["lm_head"], **arguments}))
    model.save_pretrained(directory / "out")


def copy_of(checkpoint: Path, directory: Path) -> Path:
    shutil.copytree(checkpoint, directory)
    return directory


@contextmanager
def edited_tensors(checkpoint: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Give the tensors of a checkpoint in one file, and write back what was made of them."""
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    yield tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


@contextmanager
def edited_json(path: Path) -> Iterator[dict[str, Any]]:
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


def edited_config(checkpoint: Path) -> Any:
    return edited_json(checkpoint / "config.json")


def shard(checkpoint: Path) -> None:
    """Split a checkpoint into two files with an index, in place."""
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    files = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, checkpoint / file)
        files |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": files}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))


def to_gptq(checkpoint: Path) -> None:
    """Write symmetric 4-bit weights in groups of 16 in the GPTQ format, in place, by hand."""
    with edited_tensors(checkpoint) as tensors:
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            module = name.removesuffix(".weight_packed")
            packed, scale = tensors.pop(name), tensors.pop(f"{module}.weight_scale")
            rows, columns = tensors.pop(f"{module}.weight_shape").tolist()
            # both formats store codes + 8, eight to a word; version 1 of this one zero points - 1
            tensors[f"{module}.qweight"] = packed.T
            tensors[f"{module}.scales"] = scale.T.half()
            tensors[f"{module}.qzeros"] = torch.full(
                (columns // 16, rows // 8), 0x77777777, dtype=torch.int32
            )
            tensors[f"{module}.g_idx"] = torch.arange(columns, dtype=torch.int32) // 16
    with edited_config(checkpoint) as config:
        config["quantization_config"] = {
            "quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False,
        }  # fmt: skip


def add_mtp_layer(checkpoint: Path, *, is_ignored: bool) -> None:
    """Add DeepSeek-V3's layer for next-token prediction in 16 bit, in place."""
    like = r"model.layers.1."
    sizes = {"enorm": (64,), "hnorm": (64,), "shared_head.norm": (64,), "eh_proj": (64, 128)}
    sizes |= {"embed_tokens": (128, 64), "shared_head.head": (128, 64)}
    generator = torch.Generator().manual_seed(0)
    with edited_tensors(checkpoint) as tensors:
        for name in [name for name in tensors if name.startswith(like)]:
            module, _, suffix = name.removeprefix(like).rpartition(".")
            if suffix == "weight_shape":
                sizes[module] = tuple(tensors[name].tolist())
            elif suffix in {"weight", "e_score_correction_bias"}:
                tensors[f"model.layers.2.{module}.{suffix}"] = tensors[name].clone()
        for module, size in sizes.items():
            tensors[f"model.layers.2.{module}.weight"] = torch.randn(size, generator=generator)
    with edited_config(checkpoint) as config:
        if is_ignored:
            config["quantization_config"]["ignore"].append(r"re:.*layers\.2\..*")


MadeFrom = tuple[str, Callable[[Path], None]]
# checkpoints that are made of others
VARIANTS: dict[str, MadeFrom] = {
    "GPTQ format": ("qwen3_moe", to_gptq),
    "shards": ("mixtral", shard),
    "signed, GPTQ format": ("signed", to_gptq),
    "next-token prediction": ("deepseek_v3", lambda path: add_mtp_layer(path, is_ignored=True)),
}
