"""Do time and memory grow at most linearly with the size of what is read?

``verify``, ``inspect`` and ``plan`` on checkpoints with many experts, made here with tiny widths;
a data set of which a few rows are needed; and runs in one process, one after another. Each point is
a process of its own, so that peak memory is its own::

    python benchmarks/load.py                    # a few minutes
    python benchmarks/load.py --experts 512 --layers 64 --rows 2000000 --runs 20
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "load.json"
HIDDEN, WIDTH, VOCABULARY, GROUP = 32, 32, 250_000, 32
MODEL = Path(__file__).parents[1] / "examples" / "assets" / "tiny_moe"


class _Shards:
    """Files of tensors, whose headers stay below the limit of the safetensors library."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file_of: dict[str, str] = {}
        self.header: dict[str, Any] = {}
        self.data: list[bytes] = []
        self.end = 0

    def add(self, name: str, dtype: str, content: Any) -> None:
        raw = content.tobytes()
        offsets, shape = [self.end, self.end + len(raw)], list(content.shape)
        self.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        self.data.append(raw)
        self.end += len(raw)
        if len(self.header) >= 100_000:
            self.write()

    def write(self) -> None:
        name = f"model-{len(set(self.file_of.values())):05}.safetensors"
        text = json.dumps(self.header).encode()
        with (self.directory / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.writelines(self.data)
        self.file_of |= dict.fromkeys(self.header, name)
        self.header, self.data, self.end = {}, [], 0

    def finish(self) -> int:
        if self.header:
            self.write()
        index = {"metadata": {}, "weight_map": self.file_of}
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return len(self.file_of)


def write_checkpoint(directory: Path, layers: int, experts: int, *, is_quantized: bool) -> int:
    """Write a sound checkpoint of random numbers; return how many tensors it has."""
    import numpy as np

    random = np.random.default_rng(0)
    shards = _Shards(directory)
    scheme = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                    "group_size": GROUP},
    }  # fmt: skip
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16",
        "num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": 2,
        "hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "intermediate_size": WIDTH,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": VOCABULARY, "decoder_sparse_step": 1,
    }  # fmt: skip
    if is_quantized:
        config["quantization_config"] = {
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": scheme}, "ignore": ["lm_head", "re:.*mlp.gate$"],
        }  # fmt: skip
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))

    def plain(name: str, *shape: int) -> None:
        shards.add(name, "BF16", random.integers(0x3C00, 0x3D00, shape, np.uint16))

    def linear(name: str, rows: int, columns: int) -> None:
        if not is_quantized:
            plain(f"{name}.weight", rows, columns)
            return
        codes = random.integers(1, 16, (rows, columns // 8, 8), np.uint32)  # around the middle
        words = (codes << np.arange(0, 32, 4, np.uint32)).sum(2, dtype=np.uint32)
        shards.add(f"{name}.weight_packed", "I32", words.view(np.int32))
        plain(f"{name}.weight_scale", rows, columns // GROUP)
        shards.add(f"{name}.weight_shape", "I64", np.array([rows, columns]))

    plain("model.embed_tokens.weight", VOCABULARY, HIDDEN)
    plain("lm_head.weight", VOCABULARY, HIDDEN)
    plain("model.norm.weight", HIDDEN)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for norm, size in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN),
                           ("self_attn.q_norm", 16), ("self_attn.k_norm", 16)):  # fmt: skip
            plain(f"{prefix}.{norm}.weight", size)
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear(f"{prefix}.self_attn.{projection}", HIDDEN, HIDDEN)
        plain(f"{prefix}.mlp.gate.weight", experts, HIDDEN)
        for expert in range(experts):
            linear(f"{prefix}.mlp.experts.{expert}.gate_proj", WIDTH, HIDDEN)
            linear(f"{prefix}.mlp.experts.{expert}.up_proj", WIDTH, HIDDEN)
            linear(f"{prefix}.mlp.experts.{expert}.down_proj", HIDDEN, WIDTH)
    return shards.finish()


def measure_reading(task: str, layers: int, experts: int) -> dict[str, Any]:
    """Time one command on one checkpoint."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "checkpoint"
        point = {"task": "write", "directory": str(directory), "layers": layers}
        point |= {"experts": experts, "is_quantized": task != "plan"}
        size = in_process(point)["size"]  # elsewhere: its memory is none of the reader's
        before, began = peak_bytes(), time.process_time()
        if task == "inspect":
            from moeq_plugin.checkpoint.overview import inspect_model

            assert inspect_model(directory).num_experts == experts
        elif task == "plan":
            from moeq_plugin.checkpoint.plan import plan_quantization
            from moeq_plugin.checkpoint.presets import scheme_named

            assert plan_quantization(directory, scheme_named("W4A16_G32")).quantized
        else:
            from moeq_plugin import verify_checkpoint

            assert not verify_checkpoint(directory).errors
        seconds = time.process_time() - began
    return {
        "task": task, "layers": layers, "experts": experts, "size": size, "seconds": seconds,
        "bytes": peak_bytes() - before,
    }  # fmt: skip


def measure_rows(rows: int) -> dict[str, Any]:
    """Time reading 16 rows of a data set."""
    from moeq_plugin.files.datasets import read_dataset

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "data.jsonl"
        with path.open("w") as file:
            for row in range(rows):
                file.write(json.dumps({"text": f"row {row} " + "word " * 20}) + "\n")
        before, began = peak_bytes(), time.process_time()
        assert len(read_dataset(path, 16).dataset) == 16
        seconds = time.process_time() - began
    return {
        "task": "dataset", "size": rows, "seconds": seconds, "bytes": peak_bytes() - before,
    }  # fmt: skip


def measure_runs(runs: int) -> dict[str, Any]:
    """Quantize again and again in this process; count the modules that stay alive."""
    import gc

    import torch
    from datasets import Dataset
    from llmcompressor.entrypoints.oneshot import oneshot
    from transformers import AutoModelForCausalLM

    from moeq_plugin import MoEQuantModifier

    data = Dataset.from_dict({"input_ids": torch.randint(0, 100, (4, 32)).tolist()})
    alive, seconds, peak = [], [], []
    for _ in range(runs):
        began = time.process_time()
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto", trust_remote_code=False)
        recipe = MoEQuantModifier(scheme="W4A16", ignore=["lm_head"])
        oneshot(model=model, recipe=recipe, dataset=data, num_calibration_samples=4)
        del model, recipe
        gc.collect()
        alive.append(sum(isinstance(of, torch.nn.Module) for of in gc.get_objects()))
        seconds.append(time.process_time() - began)
        peak.append(peak_bytes())
    return {
        "task": "runs", "size": runs, "seconds": sum(seconds), "bytes": peak[-1] - peak[0],
        "seconds_of_runs": seconds, "modules_alive": alive,
    }  # fmt: skip


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_process(point: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--point", json.dumps(point)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(point: dict[str, Any]) -> dict[str, Any]:
    task = point.pop("task")
    if task == "write":
        return {"size": write_checkpoint(Path(point.pop("directory")), **point)}
    if task == "dataset":
        return measure_rows(**point)
    return measure_runs(**point) if task == "runs" else measure_reading(task, **point)


def growth(points: list[dict[str, Any]]) -> dict[str, float]:
    """Return how much more time and memory than size the largest point takes; 1 is linear."""
    first, last = points[0], points[-1]
    times = last["size"] / first["size"]
    return {key: last[key] / max(first[key], 1e-9) / times for key in ("seconds", "bytes")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tasks", default="inspect,plan,verify,dataset,runs")
    parser.add_argument("--point")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.point:
        print(json.dumps(measure(json.loads(asked.point))))
        return
    content = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    for task in asked.tasks.split(","):
        if task == "dataset":
            points = [{"rows": asked.rows // 10}, {"rows": asked.rows}]
        elif task == "runs":
            points = [{"runs": asked.runs}]
        else:
            points = [
                {"layers": asked.layers // part, "experts": asked.experts} for part in (4, 2, 1)
            ]
        found = []
        for point in points:
            found.append(in_process({"task": task, **point}))
            print(
                {key: of for key, of in found[-1].items() if not isinstance(of, list)}, flush=True
            )
        content[task] = {"points": found}
        if len(found) > 1:
            content[task]["growth"] = growth(found)
            print(task, content[task]["growth"], flush=True)
        asked.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
