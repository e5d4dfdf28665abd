"""RWKV on the command line: an official file goes in, a small checkpoint comes out and speaks."""

import json
import os
import subprocess
import sys

import pytest
import torch
from rwkv_models import tiny_rwkv
from typer.testing import CliRunner

pytest.importorskip("llmcompressor")

from transformers import AutoModelForCausalLM

import moeq_plugin.integrations.hf  # noqa: F401
from moeq_plugin.cli import app
from moeq_plugin.models.packed import packed_modules
from moeq_plugin.models.packed_grid import GridLinear
from moeq_plugin.records.progress import listening
from moeq_plugin.rwkv import to_official

IN_A_FRESH_PROCESS = """
import sys, torch
import moeq_plugin.integrations.hf
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer("The quick", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0]))
"""


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    texts = [f"Sentence number {n} about foxes, dogs and the weather." for n in range(8)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module", params=[6, 7])
def official(request, tmp_path_factory):
    """Write a random model as the authors publish theirs."""
    model = tiny_rwkv(f"rwkv{request.param}", vocab_size=65536).bfloat16()
    path = tmp_path_factory.mktemp("official") / f"rwkv{request.param}.pth"
    torch.save(to_official(model.state_dict()), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [(), ("--scheme", "W4A16_G32")], ids=["codebooks", "grid"])
def test_an_official_file_is_quantized_and_speaks(official, data, scheme, tmp_path):
    out = tmp_path / "out"
    few = ("--num-calibration-samples", 8, "--max-seq-length", 32)

    done = run("quantize", official, out, "--dataset", data, *few, *scheme)

    assert done.exit_code == 0, done.output
    fresh = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS, str(out)], capture_output=True, text=True
    )
    assert fresh.returncode == 0, fresh.stderr
    assert "The quick" in fresh.stdout
    model = AutoModelForCausalLM.from_pretrained(out)
    kinds = {True: packed_modules(model), False: grids(model)}
    assert kinds[not scheme]
    assert not kinds[bool(scheme)]
    assert not any(".att.w1" in name for name in (*packed_modules(model), *grids(model)))

    spoken = run("generate", out, "The quick", "--max-new-tokens", 4)

    assert spoken.exit_code == 0, spoken.output
    assert "The quick" in spoken.output


def grids(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, GridLinear)}


@pytest.mark.parametrize(
    ("size", "expected"), [(None, "model.pth is not there"), (128, "has a vocabulary of 128")]
)
def test_what_cannot_be_read_is_refused_in_a_sentence(size, expected, tmp_path):
    path = tmp_path / "model.pth"
    if size is not None:
        torch.save(to_official(tiny_rwkv("rwkv7", vocab_size=size).state_dict()), path)

    done = run("quantize", path, tmp_path / "out", "--scheme", "W4A16")

    assert done.exit_code == 2
    assert expected in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_file_that_changes_meanwhile_makes_no_model(official, data, tmp_path):
    def change(step):
        if step.phase == "save":
            os.utime(official)

    few = ("--num-calibration-samples", 8, "--max-seq-length", 32)
    with listening(change):
        done = run("quantize", official, tmp_path / "out", "--dataset", data, *few)

    assert done.exit_code == 2, done.output
    assert "was written to while it was read" in done.output
    assert not (tmp_path / "out").exists()
