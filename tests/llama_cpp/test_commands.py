"""The two commands, and what they say of a request that cannot be met."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("llmcompressor")
pytest.importorskip("gguf")

import numpy as np
from command_line import write_tiny
from tiny_families import save_tiny
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from moeq_plugin.cli import app
from moeq_plugin.core.sensitivity import SensitivityTable
from moeq_plugin.integrations.llama_cpp import ggml
from moeq_plugin.integrations.llama_cpp.matrix_file import read_matrix
from moeq_plugin.integrations.llama_cpp.type_files import read_types

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
TINY_MOE, TINY_RWKV = ASSETS / "tiny_moe", ASSETS / "tiny_rwkv"
FEW = ["--num-calibration-samples", "16", "--max-seq-length", "32"]


def has_library():
    try:
        ggml.quantize(np.ones((1, 32), dtype=np.float32), "Q8_0", None)
    except ValueError:
        return False
    return True


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("model"))


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_a_matrix_is_written_and_written_again(here, tmp_path):
    out = tmp_path / "matrix.gguf"
    for _ in range(2):
        done = run("imatrix", here / "model", out, "--dataset", here / "data.jsonl", *FEW)
        assert done.exit_code == 0, done.output
        matrix = read_matrix(out)
        assert matrix.dataset == "data.jsonl"
        assert len(matrix.tensors) == 2 * 7
        assert (f"{len(matrix.borrowed)} of them borrowed" in done.stdout) == bool(matrix.borrowed)
    assert [path.name for path in tmp_path.iterdir()] == ["matrix.gguf"]


def refused(done, command, *said):
    assert done.exit_code == 2, done.output
    assert f"moeq {command}: " in done.stderr
    for words in said:
        assert words in done.stderr


def dense(here, directory):
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((here / "model" / name).read_bytes())
    return directory


def rwkv(here, directory):
    return TINY_RWKV


@pytest.mark.parametrize("kind", [dense, rwkv])
@pytest.mark.parametrize("has_data", [True, False])
def test_a_model_without_experts_is_left_to_llama_cpp(kind, has_data, here, tmp_path):
    data = ["--dataset", here / "data.jsonl", *FEW] if has_data else []
    done = run("imatrix", kind(here, tmp_path / "model"), tmp_path / "matrix.gguf", *data)
    refused(done, "imatrix", "no routed experts", "llama-imatrix")
    assert not (tmp_path / "matrix.gguf").exists()


@pytest.mark.parametrize("command", ["imatrix", "tensor-types"])
def test_a_family_that_llama_cpp_does_not_know_is_refused(command, here, tmp_path, monkeypatch):
    monkeypatch.setattr(ggml, "_library", lambda: None)  # nothing comes to be rounded
    save_tiny("zaya", tmp_path / "model")
    more = [] if command == "imatrix" else ["--bits-per-weight", "5", "--option", "Q4_0"]
    more += [] if command == "imatrix" else ["--option", "Q8_0"]
    data = ["--dataset", here / "data.jsonl", *FEW]
    done = run(command, tmp_path / "model", tmp_path / "out", *more, *data)
    refused(done, command, "no family of llama.cpp has tensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_without_data_the_model_writes_its_own(tmp_path):
    out = tmp_path / "matrix.gguf"
    done = run("imatrix", TINY_MOE, out)
    assert done.exit_code == 0, done.output
    matrix = read_matrix(out)
    assert matrix.dataset == "text that the model wrote" and len(matrix.tensors) == 4 * 7
    assert sum(len(of.counts) for of in matrix.tensors.values()) == 4 * (4 + 3 * 16)


@pytest.mark.parametrize("command", ["imatrix", "tensor-types"])
def test_without_the_package_it_says_what_to_install(command, here, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    more = [] if command == "imatrix" else ["--bits-per-weight", "3"]
    done = run(command, here / "model", tmp_path / "out", *more)
    refused(done, command, "pip install 'moeq-plugin[llamacpp]'")
    assert not [*tmp_path.iterdir()]


def test_a_file_of_something_else_is_not_replaced(here, tmp_path):
    out = tmp_path / "notes"
    out.write_text("mine")
    refused(run("imatrix", here / "model", out), "imatrix", "not an earlier result")
    done = run("tensor-types", here / "model", out, "--bits-per-weight", 3)
    refused(done, "tensor-types", "not an earlier result")
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["Q9_K", "Q8_0"], "'Q9_K' is not a type of llama.cpp"),
        (["Q8_0"], "at least two"),
        (["F16", "Q8_0"], "F16 is a type without blocks"),
        (["Q2_K", "Q3_K"], "none of these"),  # blocks of 256 columns, and the model has 64
    ],
)
def test_types_that_cannot_be_meant(options, said, here, tmp_path, monkeypatch):
    monkeypatch.setattr(ggml, "_library", lambda: None)  # nothing comes to be rounded
    asked = [word for option in options for word in ("--option", option)]
    data = ["--dataset", here / "data.jsonl", *FEW]
    done = run(
        "tensor-types", here / "model", tmp_path / "o", "--bits-per-weight", 5, *asked, *data
    )
    refused(done, "tensor-types", said)
    assert not [*tmp_path.iterdir()]


def test_without_the_library_it_says_where_it_was_looked_for(here, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ggml._library.cache_clear()
    try:
        if has_library():
            pytest.skip("the system has llama.cpp")
        asked = ["--option", "Q4_0", "--option", "Q8_0", "--dataset", here / "data.jsonl", *FEW]
        done = run("tensor-types", here / "model", tmp_path / "o", "--bits-per-weight", 5, *asked)
        refused(done, "tensor-types", "install llama.cpp")
    finally:
        ggml._library.cache_clear()


def table_of(path):
    """A table as if measured: by how much a projection is lost depends on its name."""
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj"
        for layer in range(2)
        for expert in range(4)
        for projection in ("gate", "up", "down")
    ]
    worth = np.array([10.0 if "down" in name else 1.0 for name in names])
    SensitivityTable(
        rows=tuple(names),
        options=("Q4_0", "Q8_0"),
        domains=("all",),
        loss=np.stack([worth, worth / 100], axis=1)[None],
        num_bytes=np.tile(np.array([18, 34]) * 64, (len(names), 1)),
        num_weights=np.full(len(names), 64 * 32),
        units={"gguf": tuple(name.split(".experts.")[0] + name[-9:] for name in names)},
    ).save(path)


def test_an_allocation_becomes_arguments(here, tmp_path):
    table_of(tmp_path / "table.json")
    out = tmp_path / "types.txt"
    asked = ["--sensitivity", tmp_path / "table.json", "--bits-per-weight", 5.9]
    done = run("tensor-types", here / "model", out, *asked)
    assert done.exit_code == 0, done.output
    types = read_types(out)
    assert types.pop("token_embd.weight") == types.pop("output.weight") == "Q8_0"
    # what is lost most gets the larger type, as far as the budget reaches: a third of the tensors
    assert types == {
        f"blk.{layer}.ffn_{projection}_exps.weight": "Q8_0" if projection == "down" else "Q4_0"
        for layer in range(2)
        for projection in ("gate", "up", "down")
    }
    lines = out.read_text().splitlines()
    assert r"^blk\.1\.ffn_down_exps\.weight$=q8_0" in lines


def test_a_budget_that_nothing_meets_is_refused(here, tmp_path):
    table_of(tmp_path / "table.json")
    asked = ["--sensitivity", tmp_path / "table.json", "--bits-per-weight", 2]
    refused(run("tensor-types", here / "model", tmp_path / "o", *asked), "tensor-types", "budget")
    assert not (tmp_path / "o").exists()


def test_experts_of_one_tensor_have_one_type(tmp_path):
    from moeq_plugin.integrations.llama_cpp.type_files import chosen_types

    experts = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(2)]
    tensors = dict.fromkeys(experts, "blk.0.ffn_up_exps.weight")
    with pytest.raises(ValueError, match="target gguf"):
        chosen_types(dict(zip(experts, ["Q4_0", "Q8_0"], strict=True)), tensors)
    assert chosen_types(dict.fromkeys(experts, "Q4_0"), tensors) == {
        "blk.0.ffn_up_exps.weight": "Q4_0"
    }


def test_a_size_that_llama_cpp_decides_about_is_not_predicted(tmp_path):
    gguf = pytest.importorskip("gguf")
    from moeq_plugin.integrations.llama_cpp.file_sizes import file_size

    source = tmp_path / "source.gguf"
    writer = gguf.GGUFWriter(source, "deepseek2")
    for name in ("token_embd", "blk.0.ffn_gate_inp", "blk.0.attn_k_b"):
        writer.add_tensor(f"{name}.weight", np.ones((4, 32), dtype=np.float16))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    types = {"token_embd.weight": "Q8_0"}
    with pytest.raises(ValueError, match=r"1 matrices .* blk\.0\.attn_k_b\.weight"):
        file_size(source, types, {})
    smaller = file_size(source, {**types, "blk.0.attn_k_b.weight": "Q4_0"}, {})
    larger = file_size(source, {**types, "blk.0.attn_k_b.weight": "Q8_0"}, {})
    assert larger - smaller == 64  # 4 blocks of 34 and of 18 bytes, to a multiple of 32
    (tmp_path / "text").write_text("no such file")
    with pytest.raises(ValueError, match="not a file of llama"):
        file_size(tmp_path / "text", types, {})
