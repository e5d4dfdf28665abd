"""The planned bytes are the file's."""

from pathlib import Path

import pytest
from checkpoints import RECIPES, copy_of, edited_tensors
from compressed_tensors.compressors.format import infer_module_format
from helpers import oneshot
from torch import nn
from transformers import AutoModelForCausalLM

from moeq_plugin import MoEQuantModifier
from moeq_plugin.checkpoint.formats import tensors_of
from moeq_plugin.checkpoint.layout import lay_out
from moeq_plugin.checkpoint.open_checkpoint import open_checkpoint
from moeq_plugin.checkpoint.outputs import Output
from moeq_plugin.checkpoint.plan import plan_quantization
from moeq_plugin.checkpoint.presets import scheme_named
from moeq_plugin.checkpoint.schemes import Scheme
from moeq_plugin.integrations.llm_compressor.allocation.options import parse_option

ROOT = Path(__file__).parents[2]
SMALL = ROOT.parent / "shared" / "models" / "moe_small"
UNIFORM = [name for name in RECIPES if name not in {"mixed", "allocated", "a layer in 16 bit"}]


def sizes(directory):
    file = directory / "model.safetensors"
    tensors = open_checkpoint(directory).tensors.values()
    return sum(tensor.num_bytes for tensor in tensors), file.stat().st_size


@pytest.mark.parametrize("name", UNIFORM)
def test_the_planned_file_is_as_large_as_the_written_one(name, sound):
    path = sound(name)
    layout = lay_out(open_checkpoint(path))
    scheme = layout.schemes.groups[0].scheme

    plan = plan_quantization(path.parent / "model", scheme)

    assert (plan.tensor_bytes, plan.file_bytes) == sizes(path)
    assert set(plan.quantized) == {name for name, scheme in layout.stored.items() if scheme}
    assert plan.misfits == ()
    assert plan.source_bytes == sizes(path.parent / "model")[0]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny_moe", "moe_small"])
def test_the_size_of_the_demo_models_is_planned_to_the_byte(model, tmp_path):
    path = ROOT / "examples" / "assets" / "tiny_moe" if model == "tiny_moe" else SMALL
    if not path.exists():
        pytest.skip("only beside a development checkout")
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    oneshot(loaded, MoEQuantModifier(scheme="W4A16", ignore=["lm_head"]))
    loaded.save_pretrained(tmp_path / "out")

    plan = plan_quantization(path, Scheme("pack-quantized", 4, 128))

    assert (plan.tensor_bytes, plan.file_bytes) == sizes(tmp_path / "out")


@pytest.mark.parametrize(
    "option", ["W2A16_G16", "W3A16_G32", "W4A16_ASYM", "W5A16", "W8A16", "W8A8", "INT8_G64"]
)
def test_names_and_bytes_are_those_of_the_host(option):
    scheme, parsed = scheme_named(option), parse_option(option)
    weights = parsed.scheme.weights

    assert (scheme.num_bits, scheme.group_size, scheme.symmetric, scheme.strategy) == (
        weights.num_bits, weights.group_size, weights.symmetric, weights.strategy,
    )  # fmt: skip
    assert scheme.form == infer_module_format(nn.Linear, parsed.scheme).value
    total = 0
    for suffix, tensor in tensors_of(scheme, (96, 128)).items():
        dtype = "F32" if suffix == "weight_scale" else tensor.dtypes[0]
        total += Output(suffix, dtype, tensor.shape).num_bytes
    assert total == parsed.num_bytes(nn.Linear(128, 96, bias=False))


@pytest.mark.parametrize("name", ["W4A17", "", "W4A16_G0", "FP8", "w4a16"])
def test_a_name_that_is_no_scheme_is_refused(name):
    with pytest.raises(ValueError, match="is not a scheme that can be planned for"):
        scheme_named(name)


def test_routers_gates_and_the_output_embedding_are_kept(sound):
    plan = plan_quantization(sound("qwen2_moe").parent / "model", Scheme("pack-quantized", 4, 16))
    assert set(plan.kept.values()) == {"router", "shared-expert gate", "output embedding"}
    assert len(plan.kept) == 5
    assert not plan.kept.keys() & set(plan.quantized)


def test_what_the_groups_do_not_divide_is_named(sound):
    plan = plan_quantization(sound("qwen3_moe").parent / "model", Scheme("pack-quantized", 4, 64))
    assert len(plan.misfits) == 8
    assert all(name.endswith("down_proj") for name in plan.misfits)


@pytest.mark.parametrize(
    ("family", "scheme", "tp", "checks"),
    [
        ("qwen3_moe", Scheme("pack-quantized", 4, 16), 1, set()),
        ("qwen3_moe", Scheme("pack-quantized", 3, 16), 1, {"vllm-kernel"}),
        ("qwen3_moe", Scheme("pack-quantized", 4, 16), 4, {"tp-indivisible"}),
        ("qwen3_moe", Scheme("pack-quantized", 4, 16, False), 1, {"transformers-misreads"}),
        ("gpt_oss", Scheme("pack-quantized", 4, 16), 1, {"transformers-misreads", "vllm-refuses"}),
    ],
)
def test_warns_of_what_a_verification_would_find(family, scheme, tp, checks, sound):
    plan = plan_quantization(sound(family).parent / "model", scheme, tp=tp)
    assert {found.check for found in plan.warnings} == checks
    for found in plan.warnings:
        if found.check == "vllm-kernel":
            others = f"here and in {len(plan.quantized) - 1} more linears"
            assert found.what.endswith(others)


def test_refuses_what_cannot_be_planned_from(sound, tmp_path):
    scheme = Scheme("pack-quantized", 4, 16)
    with pytest.raises(ValueError, match="tp must be at least 1"):
        plan_quantization(sound("mixtral").parent / "model", scheme, tp=0)
    with pytest.raises(ValueError, match="quantized already"):
        plan_quantization(sound("mixtral"), scheme)
    path = copy_of(sound("mixtral").parent / "model", tmp_path / "model")
    with edited_tensors(path) as tensors:
        del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match="model.norm.weight"):
        plan_quantization(path, scheme)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors: the header"):
        plan_quantization(path, scheme)
    with pytest.raises(ValueError, match="nvfp4"):
        plan_quantization(sound("mixtral").parent / "model", Scheme("nvfp4-pack-quantized", 4, 16))
