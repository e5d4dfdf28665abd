"""What commands say of llama.cpp and its files."""

import json
import sys

import pytest

pytest.importorskip("gguf")

from tiny_families import save_tiny
from typer.testing import CliRunner

from moeq_plugin.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "FILE"],
        ["verify", "FILE"],
        ["verify", "FILE", "--source", "FILE"],
        ["plan", "FILE"],
        ["quantize", "FILE", "out", "--scheme", "W4A16"],
        ["eval", "FILE", "FILE", "--text", "text"],
        ["sample", "FILE", "out.jsonl"],
        ["imatrix", "FILE", "out.gguf"],
        ["tensor-types", "FILE", "out.txt", "--bits-per-weight", "3"],
    ],
)
def test_a_file_of_llama_cpp_is_refused_by_name(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00")
    (tmp_path / "text").write_text("a text")
    done = run(*(path if word == "FILE" else word for word in arguments))
    assert done.exit_code == 2, done.output
    assert "model.gguf is a file of llama.cpp" in done.stderr and "moeq imatrix" in done.stderr
    assert {found.name for found in tmp_path.iterdir()} == {"model.gguf", "text"}


def limits(path):
    done = run("inspect", path, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["readers"]["gguf"]


def test_inspect_asks_llama_cpp_for_its_names(tmp_path, monkeypatch):
    for family in ("qwen3_vl_moe", "zaya"):
        save_tiny(family, tmp_path / family)
    assert limits(tmp_path / "qwen3_vl_moe") == []
    (said,) = limits(tmp_path / "zaya")
    assert "no family of llama.cpp has tensors" in said and "zaya" in said
    monkeypatch.setitem(sys.modules, "gguf", None)
    (said,) = limits(tmp_path / "qwen3_vl_moe")
    assert "pip install 'moeq-plugin[llamacpp]'" in said
