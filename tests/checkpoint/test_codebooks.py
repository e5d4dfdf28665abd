"""Checkpoints with codebooks: sound ones have no finding, and each planted fault is found."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_rwkv import tiny_rwkv

pytest.importorskip("llmcompressor")

from moeq_plugin import verify_checkpoint
from moeq_plugin.core.bit_packing import pack_codes
from moeq_plugin.core.codebook import CodebookFormat, encode
from moeq_plugin.core.packed_codebook import PackedFormat
from moeq_plugin.integrations.llm_compressor.rwkv.saving import (
    PackedWords,
    keep_packed,
    write_codebooks,
)

FORMS = {
    "pairs": CodebookFormat(5, 2, group_rows=16, group_columns=16),
    "scalars": CodebookFormat(3, 1, group_rows=8, group_columns=32),
}
KEPT = (".w1", ".w2", ".a1", ".a2")


def write(directory, form, *, elementwise=False, dtype=torch.bfloat16):
    """Save a random RWKV-7 and the same with its linears in codebooks."""
    model = tiny_rwkv(directory / "source", dtype)
    encoded = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        kind = type(module).__name__
        if kind == "Linear" and name != "lm_head" and not name.endswith(KEPT):
            encoded[name] = encode(weight.detach(), form)
        if elementwise and kind == "ElementwiseScale":
            row = CodebookFormat(3, 1, group_rows=1, group_columns=64)
            encoded[name] = encode(weight.detach().reshape(1, -1), row)
    model.requires_grad_(False)
    keep_packed(model, {name: PackedWords.of(weight) for name, weight in encoded.items()})
    model.save_pretrained(directory / "out")
    write_codebooks(model, directory / "out")
    return directory / "out"


def found(out, *, source=True):
    report = verify_checkpoint(
        out, out.parent / "source" if source else None, target="transformers"
    )
    return {(finding.check, finding.where) for finding in report.findings}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("elementwise", [False, True], ids=["linears", "elementwise"])
@pytest.mark.parametrize("form", FORMS)
def test_sound_checkpoints_have_no_finding(form, elementwise, dtype, tmp_path):
    out = write(tmp_path, FORMS[form], elementwise=elementwise, dtype=dtype)
    assert found(out) == set()
    assert found(out, source=False) == set()


NAME = "model.blocks.1.att.key"
OTHER = "model.blocks.0.att.key"


def unpacked(tensors):
    form = PackedFormat(**FORMS["pairs"].__dict__, scale_dtype="bfloat16")
    return form, form.unpack(tensors[f"{NAME}.packed"], (64, 64))


def swapped_weights(tensors, _config):
    tensors[f"{NAME}.packed"] = tensors[f"{OTHER}.packed"].clone()
    return "far-from-source"


def swapped_indices(tensors, _config):
    form, weight = unpacked(tensors)
    weight.codes.copy_(weight.codes.flip(0))
    tensors[f"{NAME}.packed"] = form.pack(weight)
    return "far-from-source"


def wrong_codebook(tensors, _config):
    form, weight = unpacked(tensors)
    weight.codebook.copy_(weight.codebook.flip(2))
    tensors[f"{NAME}.packed"] = form.pack(weight)
    return "far-from-source"


def halved_codebook(tensors, _config):
    form, weight = unpacked(tensors)
    weight.codebook[0, 0] //= 2
    tensors[f"{NAME}.packed"] = form.pack(weight)
    return "saturated"


def order_of_version_2(tensors, _config):
    form, weight = unpacked(tensors)
    words = len(pack_codes(weight.codes, form.index_bits))
    tensors[f"{NAME}.packed"][:words] = pack_codes(weight.codes, form.index_bits)
    return "far-from-source"


def truncated(tensors, _config):
    tensors[f"{NAME}.packed"] = tensors[f"{NAME}.packed"][:-3].clone()
    return "wrong-shape"


def lost(tensors, _config):
    del tensors[f"{NAME}.packed"]
    return "missing-tensor"


def not_listed(_tensors, config):
    for group in config["quantization_config"]["codebooks"]:
        group["targets"] = [name for name in group["targets"] if name != NAME]
    return "unexpected-tensor"


def scale_of_nan(tensors, _config):
    form, weight = unpacked(tensors)
    weight.scale[0, 1] = torch.nan
    tensors[f"{NAME}.packed"] = form.pack(weight)
    return "scale-not-positive"


FAULTS = [
    swapped_weights, swapped_indices, wrong_codebook, halved_codebook, order_of_version_2,
    truncated, lost, not_listed, scale_of_nan,
]  # fmt: skip


@pytest.mark.parametrize("plant", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_faults_are_found_where_they_are(plant, tmp_path):
    out = write(tmp_path, FORMS["pairs"])
    tensors = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())

    expected = plant(tensors, config)

    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    # what nothing in the configuration stands for is missing as well
    beside = {("not-in-checkpoint", f"{NAME}.weight")} if plant is not_listed else set()
    assert found(out) == {(expected, f"{NAME}.packed")} | beside


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 7}, "format_version 7 .* 2, 3, which are read"),
        ({"codebooks": "all"}, "must be a list of objects"),
        ({"codebooks": [{"targets": ["a"], "index_bits": 99}]}, "index_bits must be 1 to 12"),
    ],
)
def test_a_section_that_is_none_is_refused(change, message, tmp_path):
    out = write(tmp_path, FORMS["pairs"])
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= change
    (out / "config.json").write_text(json.dumps(config))

    with pytest.raises(ValueError, match=message):
        verify_checkpoint(out)
