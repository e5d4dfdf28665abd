"""Layers for next-token prediction, which transformers drops, come along in 16 bit."""

import json
import re
import shutil

import pytest

pytest.importorskip("llmcompressor")

import torch
from examination import SCHEME, command, examine_saved, write_data
from safetensors.torch import load_file, save_file
from tiny_families import save_tiny

from moeq_plugin.checkpoint.open_checkpoint import open_checkpoint
from moeq_plugin.checkpoint.plan import plan_quantization
from moeq_plugin.checkpoint.presets import scheme_named
from moeq_plugin.cli.built import build
from moeq_plugin.integrations.llm_compressor import load_dequantized
from moeq_plugin.records.run import RunRecord

# family: what its layer is called, what else stands in it, and the config's key
KINDS = {
    "glm4_moe": ("model.layers.2.", ("eh_proj", "enorm", "hnorm", "shared_head.norm"),
                 "num_nextn_predict_layers"),
    "deepseek_v3": ("model.layers.2.", ("eh_proj", "enorm", "hnorm", "shared_head.norm",
                    "embed_tokens", "shared_head.head"), "num_nextn_predict_layers"),
    "qwen3_next": ("mtp.layers.0.", (), "mtp_num_hidden_layers"),
}  # fmt: skip
SHAPES = {"eh_proj": (64, 128), "embed_tokens": (128, 64), "shared_head.head": (128, 64)}


def add_prediction(family, path):
    """Add a layer like the last one, under the names of a file, and what stands beside it."""
    before, others, key = KINDS[family]
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    last = config["num_hidden_layers"] - 1
    added = {
        re.sub(rf"^model\.layers\.{last}\.", before, name): tensor + 1
        for name, tensor in tensors.items()
        if name.startswith(f"model.layers.{last}.")
    }
    added |= {f"{before}{name}.weight": torch.randn(SHAPES.get(name, (64,))) for name in others}
    save_file(tensors | added, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config | {key: 1}))
    return added


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, path / "model")
    added = add_prediction(request.param, path / "model")
    examined = examine_saved(request.param, path, write_data(path))
    assert examined.quantized[0] == 0, examined.quantized
    return path, added


def test_they_are_written_bit_by_bit_and_named(made):
    path, added = made
    written = {}
    for file in (path / "out").glob("*.safetensors"):
        written |= load_file(file)
    assert all(torch.equal(written[name], tensor) for name, tensor in added.items())
    kept = RunRecord.load(path / "out")[0].kept
    assert "next-token prediction" in kept.values()
    assert command("verify", path / "out", "--source", path / "model")[0] == 0


def test_the_plan_counts_them(made):
    path, added = made
    plan = plan_quantization(path / "model", scheme_named(SCHEME), build=build)
    tensors = open_checkpoint(path / "out").tensors
    assert plan.tensor_bytes == sum(tensor.num_bytes for tensor in tensors.values())
    assert plan.num_copied == len(added)
    said = command("plan", path / "model", "--scheme", SCHEME)[1]
    assert f"next-token prediction: {len(added)} tensors" in said


def test_they_are_in_nobodys_way(made):
    path, _ = made
    read = load_dequantized(path / "out")
    assert read.config.num_hidden_layers == len(read.model.layers)


def test_without_them_verify_says_so(made, tmp_path):
    path, added = made
    shutil.copytree(path / "out", tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("model_*.safetensors")
    shard.unlink()
    index = tmp_path / "out" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = content["weight_map"].items()
    content["weight_map"] = {name: file for name, file in files if name not in added}
    index.write_text(json.dumps(content))
    said = command("verify", tmp_path / "out", "--source", path / "model")[1]
    assert "mtp-dropped" in said
    assert f"and {len(added) - 1} more tensors" in said
