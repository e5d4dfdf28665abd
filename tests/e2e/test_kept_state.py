"""Whatever is kept of a run is what was kept, or is refused by its name."""

import hashlib
import json
import random
import shutil

import pytest
import torch
from test_resume import digest, run

pytest.importorskip("llmcompressor")

from helpers import int4, tiny_model

from moeq_plugin.integrations.llm_compressor.moequant.identity import model_digest

BUDGET = {
    "config_groups": None,
    "bits_per_weight": 5.0,
    "options": ["W3A16_G32", "W4A16_G32", "W8A16_G32"],
    "sensitivity": {"gradient": False},
}
OWN_TEXT = {"data": None, "ebss": {"num_sequences": 4, "seq_len": 16}}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Finished runs, of a scheme, of a budget and on own text, with all that they have kept."""
    path = tmp_path_factory.mktemp("kept")
    tiny_model("qwen3_moe", path / "model")
    for name, settings in (("scheme", {}), ("budget", BUDGET), ("text", OWN_TEXT)):
        run(path / "model", path / f"out-{name}", path / name, **settings)
    return path


def flip_bit(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


SETTINGS = {"scheme": {}, "budget": BUDGET, "text": OWN_TEXT}
FILES = [
    ("scheme", "layer-00000.safetensors"),
    ("scheme", "layer-00001.safetensors"),
    ("scheme", "run.json"),
    ("budget", "moeq_sensitivity.json"),
    ("budget", "moeq_sensitivity.json.sha256"),
    ("text", "ebss.jsonl"),
    ("text", "ebss.manifest.json"),
]


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_one_flipped_bit_anywhere_is_refused_by_the_name_of_the_file(kind, name, kept, tmp_path):
    rng = random.Random(f"{kind}/{name}")
    whole = digest(kept / f"out-{kind}")
    size = (kept / kind / name).stat().st_size
    for number in range(8):
        work = tmp_path / f"work{number}"
        shutil.copytree(kept / kind, work)
        flip_bit(work / name, rng.randrange(size), rng.randrange(8))
        before = {p.name: p.read_bytes() for p in work.iterdir()}
        out = tmp_path / f"out{number}"
        try:
            run(kept / "model", out, work, **SETTINGS[kind])
        except ValueError as error:
            assert name.split(".")[0] in str(error)
            assert not out.exists()
            assert before.items() <= {p.name: p.read_bytes() for p in work.iterdir()}.items()
        else:  # a bit that says nothing, such as one of a version in the manifest of a text
            assert digest(out) == whole


@pytest.mark.parametrize("position", [0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_flipped_bit_of_a_weight_is_always_refused(position, kept, tmp_path):
    shutil.copytree(kept / "scheme", tmp_path / "work")
    layer = tmp_path / "work" / "layer-00000.safetensors"
    flip_bit(layer, int(position * layer.stat().st_size), 0)
    with pytest.raises(ValueError, match="layer-00000.safetensors was changed after it had been k"):
        run(kept / "model", tmp_path / "out", tmp_path / "work")
    assert not (tmp_path / "out").exists()


def test_a_layer_that_is_gone_is_missed(kept, tmp_path):
    shutil.copytree(kept / "scheme", tmp_path / "work")
    (tmp_path / "work" / "layer-00000.safetensors").unlink()
    with pytest.raises(ValueError, match="layer-00000.safetensors is not there any more"):
        run(kept / "model", tmp_path / "out", tmp_path / "work")


@pytest.mark.parametrize("source", ["budget/layer-00000", "scheme/layer-00001"])
def test_a_layer_of_another_run_or_place_is_refused(source, kept, tmp_path):
    shutil.copytree(kept / "scheme", tmp_path / "work")
    foreign = kept / f"{source}.safetensors"
    shutil.copy(foreign, tmp_path / "work" / "layer-00000.safetensors")
    with pytest.raises(ValueError, match="layer-00000.safetensors was changed"):
        run(kept / "model", tmp_path / "out", tmp_path / "work")


def test_a_setting_that_is_taken_out_of_the_run_file_is_missed(kept, tmp_path):
    shutil.copytree(kept / "scheme", tmp_path / "work")
    path = tmp_path / "work" / "run.json"
    content = json.loads(path.read_text())
    del content["model"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"run.json was changed"):
        run(kept / "model", tmp_path / "out", tmp_path / "work")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_of_a_model_is_part_of_its_identity(dtype):
    model = torch.nn.Sequential(torch.nn.Linear(600, 500), torch.nn.Embedding(7, 3)).to(dtype)
    model.register_buffer("bias", torch.zeros(70_000))
    before = model_digest(model)
    assert model_digest(model) == before
    tensors = [*model.parameters(), *model.buffers()]
    rng = random.Random(0)
    for tensor in tensors:
        flat = tensor.data.view(-1)
        for index in [0, len(flat) - 1, *(rng.randrange(len(flat)) for _ in range(3))]:
            old = flat[index].clone()
            flat[index] += 1
            assert model_digest(model) != before
            flat[index] = old
    assert model_digest(model) == before


def test_the_scheme_is_part_of_it_too(kept, tmp_path):
    shutil.copytree(kept / "scheme", tmp_path / "work")
    with pytest.raises(ValueError, match="belongs to another run"):
        run(kept / "model", tmp_path / "out", tmp_path / "work", config_groups=int4(num_bits=3))


def test_text_that_is_not_complete_yet_is_guarded_line_by_line(kept, tmp_path):
    """What a killed process leaves: the lines that the manifest knows, and one that it does not."""
    shutil.copytree(kept / "text", tmp_path / "work")
    text, manifest = (tmp_path / "work" / f"ebss.{end}" for end in ("jsonl", "manifest.json"))
    lines = text.read_text().splitlines(keepends=True)
    known = {"sha256": hashlib.sha256("".join(lines[:2]).encode()).hexdigest(), "num_lines": 2}
    of_set = {**json.loads(manifest.read_text()), "is_complete": False, **known}
    manifest.write_text(json.dumps(of_set))
    for layer in (tmp_path / "work").glob("layer-*"):
        layer.unlink()
    text.write_text("".join(lines[:3]))
    shutil.copytree(tmp_path / "work", tmp_path / "changed")
    run(kept / "model", tmp_path / "out", tmp_path / "work", **OWN_TEXT)
    assert digest(tmp_path / "out") == digest(kept / "out-text")

    changed = lines[0].replace("[", "[1, ", 1)
    (tmp_path / "changed" / "ebss.jsonl").write_text("".join([changed, *lines[1:3]]))
    with pytest.raises(ValueError, match=r"ebss.jsonl was changed after it was sampled"):
        run(kept / "model", tmp_path / "other", tmp_path / "changed", **OWN_TEXT)
