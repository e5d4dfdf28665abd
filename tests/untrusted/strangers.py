"""A tiny sound checkpoint and everything else that a stranger may send along."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SIZE = 32
INDEX = "model.safetensors.index.json"
SCHEME = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                "group_size": SIZE},
}  # fmt: skip
CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16",
    "num_hidden_layers": 1, "num_experts": 2, "num_experts_per_tok": 1, "hidden_size": SIZE,
    "moe_intermediate_size": SIZE, "intermediate_size": SIZE, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 8, "decoder_sparse_step": 1,
    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": SCHEME}, "ignore": ["lm_head", "re:.*mlp.gate$"],
    },
}  # fmt: skip
RECORD = {
    "schema_version": 1,
    "runs": [
        {
            "modifier": "MoEQuantModifier", "settings": {"scheme": "W4A16"},
            "versions": {"torch": "2"}, "limits": ["a limit"], "kept": {"lm_head": "ignored"},
            "linears": [
                {"name": f"model.layers.0.mlp.experts.{expert}.up_proj", "basis": "own",
                 "scheme": "W4 symmetric group 32", "effective_tokens": 9.0, "loss": 0.1}
                for expert in range(2)
            ],
            "bits_per_weight": 4.5, "model": "someone/model", "calibration": "text",
        }
    ],
}  # fmt: skip


def tensors():
    random = torch.Generator().manual_seed(0)
    prefix = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (8, SIZE), "lm_head.weight": (8, SIZE),
        "model.norm.weight": (SIZE,), f"{prefix}.input_layernorm.weight": (SIZE,),
        f"{prefix}.post_attention_layernorm.weight": (SIZE,),
        f"{prefix}.self_attn.q_norm.weight": (16,), f"{prefix}.self_attn.k_norm.weight": (16,),
        f"{prefix}.mlp.gate.weight": (2, SIZE),
    }  # fmt: skip
    found = {n: torch.rand(s, generator=random).bfloat16() + 0.5 for n, s in shapes.items()}
    linears = [f"{prefix}.self_attn.{p}_proj" for p in "qkvo"]
    linears += [
        f"{prefix}.mlp.experts.{e}.{p}_proj" for e in (0, 1) for p in ("gate", "up", "down")
    ]
    for name in linears:
        codes = torch.randint(1, 16, (SIZE, SIZE // 8, 8), generator=random)  # around 8, which is 0
        words = (codes << torch.arange(0, 32, 4)).sum(-1)
        found[f"{name}.weight_packed"] = words.to(torch.int32)  # the low half of each
        found[f"{name}.weight_scale"] = torch.rand(SIZE, 1, generator=random).bfloat16() + 0.5
        found[f"{name}.weight_shape"] = torch.tensor([SIZE, SIZE])
    return found


def write_checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True)
    save_file(tensors(), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "moeq_run.json").write_text(json.dumps(RECORD))
    return directory


def write_index(directory: Path) -> None:
    files = dict.fromkeys(tensors(), "model.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def edited(directory: Path, name: str = "config.json"):
    """Return the content of a JSON file, and a function that writes it back."""
    path = directory / name
    content = json.loads(path.read_text())
    return content, lambda: path.write_text(json.dumps(content))


def snapshot(root: Path) -> dict[str, bytes | str]:
    """Return everything below a directory, links and their targets included."""
    found: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "directory" if path.is_dir() else "special"
    return found
