"""Small quantized checkpoints made of random codes, without a model behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

from moeq_plugin.core.gptq_format import Codes, ZeroPoints, encode
from moeq_plugin.core.grid import Grid

SHAPES = {"q_proj": (64, 96), "gate_proj": (32, 64), "down_proj": (64, 32)}
LINEARS = {
    "model.layers.0.self_attn.q_proj": SHAPES["q_proj"],
    **{
        f"model.layers.0.mlp.experts.{e}.{p}": SHAPES[p]
        for e in range(2)
        for p in ("gate_proj", "down_proj")
    },
}
PLAIN = {
    "model.embed_tokens.weight": (8, 64),
    "model.layers.0.mlp.gate.weight": (2, 64),
    "model.layers.0.input_layernorm.weight": (64,),
}


def random_linears(
    grid: Grid, *, seed: int = 0, lowest_zero: int | None = None, signed: bool = False
) -> dict:
    """Return :class:`Codes` by name."""
    rng = torch.Generator().manual_seed(seed)
    linears = {}
    for name, (rows, columns) in LINEARS.items():
        group = grid.group_of_column(columns)
        groups = int(group[-1]) + 1
        low = grid.lowest + 1 if lowest_zero is None else lowest_zero
        zero_point = torch.randint(low, grid.highest + 1, (rows, groups), generator=rng)
        zero_point = torch.zeros_like(zero_point) if grid.symmetric else zero_point
        codes = torch.randint(grid.lowest, grid.highest + 1, (rows, columns), generator=rng)
        scale = torch.rand(rows, groups, generator=rng).to(torch.bfloat16)
        if signed:
            scale *= torch.randint(0, 2, scale.shape, generator=rng) * 2 - 1
        linears[name] = Codes(codes.to(torch.int8), scale, zero_point.to(torch.int8), group)
    return linears


def packed_tensors(linears: dict[str, Codes], grid: Grid) -> dict[str, torch.Tensor]:
    """Return what compressed-tensors stores, packed by its own helper, and plain tensors."""
    tensors = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in PLAIN.items()}
    for name, weight in linears.items():
        tensors[f"{name}.weight_packed"] = pack_to_int32(weight.codes, grid.num_bits)
        tensors[f"{name}.weight_scale"] = weight.scale
        tensors[f"{name}.weight_shape"] = torch.tensor(weight.codes.shape)
        if not grid.symmetric:
            packed = pack_to_int32(weight.zero_point, grid.num_bits, packed_dim=0)
            tensors[f"{name}.weight_zero_point"] = packed.contiguous()
    return tensors


def packed_section(grid: Grid, **weights: Any) -> dict[str, Any]:
    """Return the ``quantization_config`` of such a checkpoint; ``weights`` overrides fields."""
    args = {
        "num_bits": grid.num_bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
        **weights,
    }
    group = {"targets": ["Linear"], "weights": args, "format": "pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def gptq_tensors(
    linears: dict[str, Codes], grid: Grid, zeros: ZeroPoints = ZeroPoints.V1
) -> dict[str, torch.Tensor]:
    """Return what the GPTQ format stores, and plain tensors."""
    tensors = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in PLAIN.items()}
    for name, weight in linears.items():
        stored = encode(weight, grid.num_bits, zeros)
        tensors |= {f"{name}.{part}": tensor for part, tensor in vars(stored).items()}
    return tensors


def gptq_section(grid: Grid, **changes: Any) -> dict[str, Any]:
    """Return the ``quantization_config`` of such a checkpoint."""
    return {
        "quant_method": "gptq",
        "bits": grid.num_bits,
        "group_size": grid.group_size or -1,
        "sym": grid.symmetric,
        "desc_act": False,
        **changes,
    }


def write_checkpoint(
    directory: Path,
    tensors: dict[str, torch.Tensor],
    section: dict[str, Any] | None,
    *,
    model_type: str = "qwen3_moe",
    num_files: int = 1,
) -> Path:
    """Write tensors in turn to ``num_files`` files, and a configuration."""
    directory.mkdir(parents=True)
    config: dict[str, Any] = {"model_type": model_type, "hidden_size": 64}
    if section is not None:
        config["quantization_config"] = section
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "README.md").write_text("about the other format")
    names = list(tensors)
    for i in range(num_files):
        of_file = {name: tensors[name].contiguous() for name in names[i::num_files]}
        file_name = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        save_file(of_file, directory / ("model.safetensors" if num_files == 1 else file_name))
    return directory
