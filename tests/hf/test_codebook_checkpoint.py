"""What is saved with codebooks: small, reloads in a fresh process, runs packed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import dataset, oneshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_rwkv import tiny_rwkv

pytest.importorskip("llmcompressor")

from transformers import AutoModelForCausalLM

import moeq_plugin.integrations.hf  # noqa: F401
from moeq_plugin import RWKVQuantModifier
from moeq_plugin.core.bit_packing import pack_codes
from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.models.packed import packed_modules
from moeq_plugin.models.packed_grid import GridLinear
from moeq_plugin.records.run import RunRecord

SHIPPED = Path(__file__).parents[2] / "examples" / "assets" / "tiny_rwkv"
FORM = CodebookFormat(4, 2, group_rows=32, group_columns=16)
# everything that can be quantized: the low-rank factors and the element-wise weights too
ALL = {
    "targets": ["Linear", r"re:.*\.att\.[wavg][12]$"],
    "elementwise": CodebookFormat(3, 1, group_rows=1, group_columns=64),
}
TOKENS = torch.arange(1, 40)[None]
KINDS = {"hybrid": {"scalar_frac": 0.6}, "codebooks": {"scalar_frac": 0.0}, "grids": {}}
PROBE = """
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
import moeq_plugin.integrations.hf, moeq_plugin.rwkv
from moeq_plugin.models.packed import packed_modules

tokens = torch.arange(1, 40)[None]
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    num_packed = len(packed_modules(model))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        length = {"min_new_tokens": 8, "max_new_tokens": 8}  # whatever token would end it
        text = model.generate(tokens[:, :4], **length, do_sample=False)
    assert len(packed_modules(model)) == num_packed
    torch.save([num_packed, logits, text], directory + "/probe.pt")
"""


def quantize(directory, kind="hybrid", dtype=torch.bfloat16):
    """Return a quantized model and where it was saved."""
    model = tiny_rwkv(directory / "model", dtype)
    recipe = RWKVQuantModifier(**{"scalar_frac": 1.0, "codebook": FORM, **ALL, **KINDS[kind]})
    oneshot(model, recipe, output_dir=str(directory / "out"))
    return model.eval(), directory / "out"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return one quantized model of each kind and where it was saved; read only."""
    return {kind: quantize(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def edited(out, tmp_path, **fields):
    """Return a copy of a checkpoint with other fields in its quantization section."""
    copy = shutil.copytree(out, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= fields
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_a_fresh_process_loads_the_same_and_generates_from_packed_weights(saved):
    directories = [str(out) for _, out in saved.values()]
    subprocess.run([sys.executable, "-c", PROBE, *directories], check=True)

    for model, out in saved.values():
        num_packed, logits, text = torch.load(out / "probe.pt")
        assert num_packed == len(packed_modules(model)) > 0
        # in memory scalar weights are still plain
        assert close(logits, model(input_ids=TOKENS).logits)
        assert torch.equal(logits, loaded_logits(out))
        assert text.shape == (1, 12)


def close(found, expected):
    """Tell whether logits agree but for the rounding of bfloat16 products."""
    return (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_dequantizing_changes_no_output_beyond_rounding(saved):
    _, out = saved["hybrid"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert grids(model)
    expected = model(input_ids=TOKENS).logits

    model.dequantize()

    assert not packed_modules(model)
    assert not grids(model)
    assert close(model(input_ids=TOKENS).logits, expected)


def grids(model):
    return [module for module in model.modules() if isinstance(module, GridLinear)]


def test_no_weight_is_unpacked_by_running(saved):
    for _, out in saved.values():
        model = AutoModelForCausalLM.from_pretrained(out)
        before = {name: p.nbytes for name, p in model.named_parameters()}
        stored = sum(t.nbytes for t in load_file(out / "model.safetensors").values())

        model(input_ids=TOKENS)

        assert {name: p.nbytes for name, p in model.named_parameters()} == before
        assert sum(before.values()) == stored


def test_version_2_of_the_format_still_loads(saved, tmp_path):
    model, out = saved["hybrid"]
    copy = edited(out, tmp_path, format_version=2)
    tensors = load_file(copy / "model.safetensors")
    for name, module in packed_modules(model).items():
        tensors[f"{name}.packed"] = packed_as_version_2(module)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})

    loaded = AutoModelForCausalLM.from_pretrained(copy)

    assert torch.equal(loaded(input_ids=TOKENS).logits, loaded_logits(out))
    loaded.save_pretrained(tmp_path / "again")
    section = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert section["format_version"] == 3
    assert torch.equal(loaded_logits(tmp_path / "again"), loaded_logits(out))


def packed_as_version_2(module):
    """Pack as version 2 did: indices row by row, centroids one after the other."""
    weight = module.form.unpack(module.packed, module.matrix_shape)
    parts = pack_codes(weight.codes, weight.form.index_bits), weight.scale, weight.codebook
    stored = torch.cat([part.flatten().view(torch.uint8) for part in parts])
    return torch.nn.functional.pad(stored, (0, -len(stored) % 4)).view(torch.int32)


def loaded_logits(directory):
    return AutoModelForCausalLM.from_pretrained(directory)(input_ids=TOKENS).logits


def test_a_configuration_can_ask_for_plain_weights(saved, tmp_path):
    model, out = saved["hybrid"]
    out = edited(out, tmp_path, dequantize=True)

    plain = AutoModelForCausalLM.from_pretrained(out)

    assert not packed_modules(plain)
    names = [name for name, _ in plain.named_parameters()]
    assert not [n for n in names if n.endswith("packed")]
    assert close(plain(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_a_loaded_model_saves_again_also_after_it_has_run(saved, tmp_path):
    _, out = saved["hybrid"]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    expected = loaded(input_ids=TOKENS).logits

    loaded.save_pretrained(tmp_path / "again")

    assert torch.equal(loaded_logits(tmp_path / "again"), expected)
    first, second = (load_file(d / "model.safetensors") for d in (out, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_dtype_can_be_asked_for(saved):
    model, out = saved["hybrid"]

    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)

    name, module = next(iter(packed_modules(loaded).items()))
    assert module.weight.dtype == torch.float32
    # the product of codebook and scale is rounded to the dtype
    original = model.get_submodule(name).weight
    assert torch.equal(module.weight.bfloat16(), original)
    assert loaded(input_ids=TOKENS).logits.dtype == torch.float32


def test_scalar_weights_are_stored_as_compressed_tensors_does(saved):
    _, out = saved["hybrid"]

    with safe_open(out / "model.safetensors", "pt") as file:
        names = set(file.keys())

    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["scalar"]["format"] == "pack-quantized"
    targets = [t for g in config["scalar"]["config_groups"].values() for t in g["targets"]]
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    assert {f"{t}.{p}" for t in targets for p in parts} <= names
    assert not {f"{t}.weight" for t in targets} & names


def test_the_configuration_lists_what_the_record_lists(saved):
    _, out = saved["hybrid"]

    config = json.loads((out / "config.json").read_text())["quantization_config"]
    (run,) = RunRecord.load(out)
    listed = {t for group in config["codebooks"] for t in group["targets"]}
    assert listed == {r.name for r in run.linears if r.scheme.startswith("codebook")}
    scalar = {t for g in config["scalar"]["config_groups"].values() for t in g["targets"]}
    assert scalar == {n for n, s in run.uniformity.items() if s["scalar"]}


def test_the_file_is_as_small_as_the_bits_per_weight_say(tmp_path):
    wide = {"hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": 1}
    cheap = CodebookFormat(2, 1, group_rows=64, group_columns=16)
    recipe = RWKVQuantModifier(scalar_frac=0.8, codebook=cheap, refine_steps=0, **ALL)

    size, stated = sizes(tiny_rwkv(tmp_path / "model", **wide), recipe, tmp_path / "out")

    assert 1.0 <= size / stated <= 1.02
    assert size < 0.3 * (tmp_path / "model" / "model.safetensors").stat().st_size


def test_so_is_that_of_the_shipped_model_with_the_default_recipe(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.bfloat16)

    size, stated = sizes(model, RWKVQuantModifier(), tmp_path / "out")

    assert 1.0 <= size / stated <= 1.02


def sizes(model, recipe, out):
    """Return the bytes of the file that a run leaves, and those that its record comes to."""
    whole = sum(p.numel() for p in model.parameters())
    numbers = {n.removesuffix(".weight"): p.numel() for n, p in model.named_parameters()}
    oneshot(model, recipe, dataset(1), output_dir=str(out))
    (run,) = RunRecord.load(out)
    quantized = sum(numbers[record.name] for record in run.linears)
    stated = quantized * run.bits_per_weight / 8 + (whole - quantized) * 2
    return (out / "model.safetensors").stat().st_size, stated


def test_another_version_of_the_format_is_refused(saved, tmp_path):
    out = edited(saved["hybrid"][1], tmp_path, format_version=7)

    with pytest.raises(ValueError, match="format version 7, this package reads 2 and 3: install"):
        AutoModelForCausalLM.from_pretrained(out)


def test_a_tensor_of_another_size_is_named(saved, tmp_path):
    model, out = saved["hybrid"]
    name = f"{next(reversed(packed_modules(model)))}.packed"
    copy = edited(out, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    tensors[name] = tensors[name][1:].clone()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})

    message = rf"{name} should be \[\d+\] for .* the checkpoint has \[\d+\]"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(copy)


def test_without_the_reader_codebooks_are_refused_and_not_left_random(saved):
    _, out = saved["hybrid"]
    code = (
        "import moeq_plugin.rwkv\nfrom transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(out)!r})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "only after `import moeq_plugin.integrations.hf`" in run.stderr
