"""Checkpoints reload bit by bit in plain transformers, in a process that never saw our code."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import FAMILIES, int4, oneshot, tiny_model, tokens
from safetensors.torch import load_file, save_file

pytest.importorskip("llmcompressor")

from moeq_plugin import MoEQuantModifier
from moeq_plugin.integrations.llm_compressor.checkpoint.loading import load_dequantized
from moeq_plugin.models.moe import find_moe_layers
from moeq_plugin.records.run import RunRecord

RELOADABLE = [family for family in FAMILIES if family != "gpt_oss"]
MIXED = {
    "group_0": {**int4(16)["group_0"], "targets": ["re:.*layers.0.*experts.*_proj$"]},
    "group_1": {**int4(None, num_bits=8)["group_0"], "targets": ["re:.*layers.1.*experts.*_proj$"]},
}
# reads directories from its arguments, says for each whether model and logits came back
RELOAD = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
results = {}
for directory in map(Path, sys.argv[1:]):
    expected = torch.load(directory / "expected.pt")
    model, info = AutoModelForCausalLM.from_pretrained(
        directory / "out", dtype=torch.float32, output_loading_info=True
    )
    experts = model.get_submodule(expected["layer"]).experts
    fused = {name: value for name, value in experts.named_parameters()}
    same = all(
        torch.equal(fused["gate_up_proj"][e], torch.cat([weights["gate"], weights["up"]]))
        and torch.equal(fused["down_proj"][e], weights["down"])
        for e, weights in enumerate(expected["experts"])
    )
    logits = model(expected["ids"]).logits
    results[directory.name] = {
        "experts_identical": same,
        "difference": (logits - expected["logits"]).abs().max().item(),
        "unaccounted": {key: len(names) for key, names in info.items()},
    }
assert "moeq_plugin" not in sys.modules and "llmcompressor" not in sys.modules
print(json.dumps(results))
"""


def save_quantized(family, directory, **modifier):
    """Quantize, remember what must come back, save."""
    model = tiny_model(family, directory / "model")
    oneshot(model, MoEQuantModifier(**{"config_groups": int4(16), **modifier}))
    layer = find_moe_layers(model)[-1]
    experts = [layer.expert(e) for e in range(layer.num_experts)]
    ids = tokens(2, 16, seed=5)
    expected = {
        "layer": layer.name,
        "ids": ids,
        "logits": model(ids).logits.detach(),
        "experts": [
            {
                p: getattr(expert, f"{p}_proj").weight.detach().clone()
                for p in ("gate", "up", "down")
            }
            for expert in experts
        ],
    }
    torch.save(expected, directory / "expected.pt")
    model.save_pretrained(directory / "out")


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    root = tmp_path_factory.mktemp("reload")
    directories = [root / family for family in RELOADABLE]
    for directory in directories:
        directory.mkdir()
        save_quantized(directory.name, directory)
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, *map(str, directories)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("family", RELOADABLE)
def test_a_fresh_process_gets_the_same_weights(family, reloaded):
    result = reloaded[family]
    assert result["experts_identical"]
    assert not any(result["unaccounted"].values())
    # fused experts sum the same products in another order
    assert result["difference"] < 1e-5


def test_mixtral_is_written_under_the_names_that_loading_expects(tmp_path):
    save_quantized("mixtral", tmp_path)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    expert = "model.layers.1.block_sparse_moe.experts.3"
    for projection in ("w1", "w2", "w3"):
        assert f"{expert}.{projection}.weight_packed" in names
    assert not any("_proj" in name and "experts" in name for name in names)


@pytest.mark.parametrize(
    ("family", "groups", "sentence"),
    [
        ("gpt_oss", int4(16), "no rule to read this architecture's experts"),
        ("qwen3_moe", int4(16, symmetric=False), "does not read zero points of experts"),
        ("qwen3_moe", MIXED, "the experts do not all have one scheme"),
    ],
    ids=["gpt-oss", "asymmetric", "mixed"],
)
def test_what_plain_transformers_cannot_read_is_said_before_saving(
    family, groups, sentence, tmp_path
):
    save_quantized(family, tmp_path, config_groups=groups)
    (record,) = RunRecord.load(tmp_path / "out")
    assert any(sentence in limit for limit in record.limits)


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("gpt_oss", int4(16)),
        ("mixtral", int4(16)),
        ("qwen3_moe", int4(16, symmetric=False)),
        ("mixtral", int4(16, num_bits=3)),
        ("deepseek_v2", int4(None, num_bits=8)),
        ("qwen2_moe", MIXED),
    ],
    ids=["gpt-oss", "mixtral", "asymmetric", "3-bit", "8-bit", "mixed"],
)
def test_our_own_loader_reads_every_checkpoint_as_it_was_saved(family, groups, tmp_path):
    save_quantized(family, tmp_path, config_groups=groups)
    expected = torch.load(tmp_path / "expected.pt")

    model = load_dequantized(tmp_path / "out")

    experts = model.get_submodule(expected["layer"]).experts
    for e, weights in enumerate(expected["experts"]):
        for projection, weight in weights.items():
            assert torch.equal(getattr(experts[e], f"{projection}_proj").weight, weight)
    torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"])


def test_our_own_loader_accounts_for_every_tensor(tmp_path):
    save_quantized("mixtral", tmp_path)
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    removed = next(k for k in tensors if k.endswith("experts.1.w2.weight_packed"))
    save_file({k: t for k, t in tensors.items() if removed[:-7] not in k}, path)
    with pytest.raises(
        ValueError, match=r"missing \['model.layers.0.mlp.experts.1.down_proj.weight"
    ):
        load_dequantized(tmp_path / "out")


def test_mixed_schemes_within_a_layer_are_named_for_vllm(tmp_path):
    groups = {
        "group_0": {**int4(16)["group_0"], "targets": ["re:.*experts.0.*_proj$"]},
        "group_1": {**int4(32)["group_0"], "targets": ["re:.*experts.[123].*_proj$"]},
    }
    save_quantized("qwen3_moe", tmp_path, config_groups=groups)
    (record,) = RunRecord.load(tmp_path / "out")
    named = [limit for limit in record.limits if "vLLM applies that of expert 0" in limit]
    assert [limit.split(":")[0] for limit in named] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_a_sound_checkpoint_has_no_limits(tmp_path):
    save_quantized("mixtral", tmp_path)
    (record,) = RunRecord.load(tmp_path / "out")
    assert record.limits == []
