"""Every Mixture-of-Experts family of transformers: quantized right, or refused in one sentence.

A tiny random model of each goes through the commands, and everything that was written is compared
with the 16-bit model. ``docs/models.md`` says what came out, from the record beside this file.
"""

import json
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("llmcompressor")

import torch
from examination import SCHEME, command, examine, linear_model, logits, record
from tiny_families import FAMILIES, save_tiny
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moeq_plugin.checkpoint.config import EXPERT_KEYS
from moeq_plugin.checkpoint.open_checkpoint import open_checkpoint
from moeq_plugin.checkpoint.plan import plan_quantization
from moeq_plugin.checkpoint.presets import scheme_named
from moeq_plugin.cli.built import build
from moeq_plugin.core.names import canonical
from moeq_plugin.integrations.llm_compressor import load_dequantized
from moeq_plugin.models.auto_class import auto_class_of
from moeq_plugin.models.moe import find_moe_layers

RECORDED = Path(__file__).with_name("recorded_families.json")
SERVED = Path(__file__).with_name("recorded_vllm.json")
# one of each kind: plain, multi-modal, hybrid, made linear by us, refused
QUICK = {"qwen3_moe", "glm4_moe", "qwen3_vl_moe", "nemotron_h", "llama4", "longcat_flash", "doge"}
# parts of models that are described as a whole, or no language models
NO_FAMILIES = {
    "qwen3_omni_moe_text", "qwen3_omni_moe_talker_text", "vitpose_backbone", "step3p5",
}  # fmt: skip


def parametrized():
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES
    ]


@pytest.fixture(scope="module", params=parametrized())
def examined(request, tmp_path_factory):
    return examine(request.param, tmp_path_factory.mktemp(request.param))


@cache
def loaded(path):
    return load_dequantized(path)


@pytest.fixture
def written(examined):
    """Return the dequantized model that was written, or skip what was refused."""
    if examined.refusal:
        pytest.skip("refused")
    return loaded(examined.out)


def test_no_family_of_transformers_is_left_out():
    """A newer transformers brings new ones: describe each in ``tiny/``."""
    described = set()
    for name, entry in FAMILIES.items():
        config = CONFIG_MAPPING[entry.get("model_type", name)]
        parts = (config.sub_configs or {}).values()
        described |= {entry.get("model_type", name), entry["text"].get("model_type")}
        described |= {getattr(part, "model_type", None) for part in parts}
    left_out = []
    for model_type in CONFIG_MAPPING:
        classes = CONFIG_MAPPING[model_type].__mro__
        fields = {name for cls in classes for name in getattr(cls, "__annotations__", {})}
        if fields & set(EXPERT_KEYS) and model_type not in described | NO_FAMILIES:
            left_out.append(f"{model_type}: not described")
    assert left_out == []


def test_plan_and_run_agree(examined):
    """They both do it, or refuse it with one sentence and leave nothing behind."""
    assert examined.inspected[0] == 0, examined.inspected
    if examined.planned[0] == 0:
        assert examined.quantized[0] == 0, examined.quantized
        return
    sentence = examined.planned[1].removeprefix("moeq plan: ")
    assert (examined.planned[0], examined.quantized[0]) == (2, 2)
    assert examined.quantized[1].endswith(f"moeq quantize: {sentence}")
    assert f"quantize: {sentence}" in examined.inspected[1]
    assert {path.name for path in examined.directory.iterdir()} == {"model", "data.jsonl"}


def test_the_plan_is_the_file_to_the_byte(examined, written):
    plan = plan_quantization(examined.source, scheme_named(SCHEME), build=build)
    tensors = open_checkpoint(examined.out).tensors
    found = {canonical(n).removesuffix(".weight_packed") for n in tensors if "_packed" in n}
    assert set(plan.quantized) == found
    assert plan.tensor_bytes == sum(tensor.num_bytes for tensor in tensors.values())
    assert plan.file_bytes == (examined.out / "model.safetensors").stat().st_size


def test_every_expert_is_quantized_and_all_else_is_as_it_was(examined, written, tmp_path):
    """The whole file against the source: experts, routers, norms, towers, heads."""
    model, layers = linear_model(examined.name, tmp_path)
    source, found = model.state_dict(), written.state_dict()
    assert source.keys() == found.keys()
    quantized = set()
    for name, tensor in source.items():
        there = found[name]
        assert there.isfinite().all(), name
        if torch.equal(there, tensor):
            continue
        quantized.add(name)
        assert there.abs().amax(dim=1).gt(0).equal(tensor.abs().amax(dim=1).gt(0)), name
        assert (there - tensor).norm() < 0.5 * tensor.norm(), name
    experts = {
        f"{name}.weight"
        for layer in layers
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{layer.name}.experts.")
    }
    assert experts <= quantized
    packed = [n for n in open_checkpoint(examined.out).tensors if n.endswith("weight_packed")]
    assert len(quantized) == len(packed)
    # and nothing of the experts was lost when they were made linears
    fused = save_tiny(examined.name, tmp_path / "fused")
    assert sum(source[name].numel() for name in experts) == num_expert_weights(fused)


def num_expert_weights(model):
    """Count the weights of routed experts in a model as transformers builds it."""
    idle = getattr(model.config, "zero_expert_num", None) or 0  # experts that do nothing
    total = 0
    for name, parameter in model.named_parameters():
        if "experts" in name.split(".") and parameter.ndim > 1 and not name.endswith("bias"):
            used = parameter[: len(parameter) - idle] if "gate_up" in name else parameter
            total += used.numel()
    return total


def test_inspect_counts_layers_and_experts(examined, written):
    layers = find_moe_layers(written)
    experts = (layers[0].expert(index).modules() for index in range(layers[0].num_experts))
    number = sum(any(isinstance(module, nn.Linear) for module in expert) for expert in experts)
    assert (
        f" {len(layers)} of {written.config.get_text_config().num_hidden_layers} layers with "
        in (examined.inspected[1])
    )
    assert f" layers with {number} experts" in examined.inspected[1]


def test_it_is_sound_for_every_reader_that_it_claims(examined, written):
    """And what is claimed of plain transformers is what it then does."""
    sound = command("verify", examined.out, "--source", examined.source, "--target", "vllm")
    skipped = json.loads(SERVED.read_text()).get(examined.name, {}).get("refusal", "")
    # vLLM 0.32 finds no experts of these two, which its own strict loading says
    without_experts = examined.name in {"gpt_oss", "openai_privacy_filter"}
    assert sound[0] == without_experts, sound
    assert not without_experts or "not initialized" in skipped
    for_transformers = command("verify", examined.out, "--target", "transformers")
    assert (for_transformers[0] == 0) == reads_exactly(examined.out), for_transformers


@cache
def reads_exactly(path):
    """Tell whether plain transformers computes with a checkpoint what we read of it."""
    written = loaded(path)
    loader = auto_class_of(written.config)
    try:
        model, info = loader.from_pretrained(path, output_loading_info=True)
    except Exception:  # whatever it fails with, it does not read it
        return False
    if info["missing_keys"]:
        return False
    scale = logits(written).abs().max()
    return bool((logits(model) - logits(written)).abs().max() < 1e-4 * scale)


def test_the_record_is_what_came_out(examined):
    recorded = json.loads(RECORDED.read_text())
    reloads = None if examined.refusal else reads_exactly(examined.out)
    assert recorded[examined.name] == record(examined, reloads)


def main() -> None:
    """Examine all families anew and write down what came out."""
    import tempfile

    found = {}
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            examined = examine(name, Path(directory))
            reloads = None if examined.refusal else reads_exactly(examined.out)
            found[name] = record(examined, reloads)
            RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
