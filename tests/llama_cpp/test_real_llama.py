"""llama.cpp's own program reads our matrix, uses it for every expert, and writes what we said."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("llmcompressor")
pytest.importorskip("gguf")

import gguf
from gguf_model import put_in, read_weights, write_gguf
from helpers import dataset, oneshot, tiny_model
from real_llama import PROGRAMS, QUANTIZE, LlamaError, logits, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeq_plugin.integrations.llama_cpp import ggml
from moeq_plugin.integrations.llama_cpp.file_sizes import file_size, matrix_pairs
from moeq_plugin.integrations.llama_cpp.matrix_file import write_matrix
from moeq_plugin.integrations.llama_cpp.modifier import ImportanceModifier
from moeq_plugin.integrations.llama_cpp.type_files import with_embeddings, write_types

TINY = Path(__file__).parents[2] / "examples" / "assets" / "tiny_moe"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.llama,
    pytest.mark.skipif(not QUANTIZE.exists(), reason="no llama.cpp: run `make llama` first"),
]
STARVED = 5
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts_per_tok": 1, "head_dim": 64}


@pytest.fixture(scope="module", autouse=True)
def on_the_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}")
        yield


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model of 256 columns that never calls one expert, as llama.cpp holds it, and a matrix."""
    directory = tmp_path_factory.mktemp("wide")
    model = tiny_model("qwen3_moe", directory / "model", num_experts=8, **WIDE)
    router = model.model.layers[0].mlp.gate
    with torch.no_grad():
        router.weight[STARVED] = 0
        router.weight[1] = -router.weight[0]
    model.to(torch.bfloat16).save_pretrained(directory / "model")
    write_gguf(directory / "model", directory / "source.gguf")
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    modifier = ImportanceModifier(dataset_name="random tokens", min_effective_tokens=4)
    oneshot(model, modifier)
    write_matrix(directory / "matrix.gguf", modifier.matrix)
    return directory, modifier.matrix


def test_llama_cpp_computes_what_transformers_does(tmp_path):
    write_gguf(TINY, tmp_path / "tiny.gguf")
    text = (TINY.parent / "heldout.txt").read_text()[:2000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(TINY)(text)["input_ids"][:128]).view(2, 64)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)
    found = torch.from_numpy(logits(tmp_path / "tiny.gguf", ids.numpy())).log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 0 <= divergence < 1e-4


@pytest.mark.parametrize("type_name", ["IQ2_S", "Q2_K", "Q3_K", "IQ3_S", "Q4_K"])
def test_every_expert_is_rounded_with_its_row_of_the_matrix(wide, type_name):
    directory, matrix = wide
    assert any(f"experts.{STARVED}." in name for name in matrix.borrowed)
    out, types = directory / f"{type_name}.gguf", directory / "types.txt"
    write_types(types, with_embeddings(dict.fromkeys(matrix.tensors, type_name), 256))
    said = quantize(
        directory / "source.gguf", out, "Q2_K",
        "--imatrix", directory / "matrix.gguf", "--tensor-type-file", types,
    )  # fmt: skip
    # it says so of embeddings, for which its own program collects nothing either
    missing = [line for line in said.splitlines() if "did not find weights for" in line]
    assert all(line.rstrip().endswith(("token_embd.weight", "output.weight")) for line in missing)
    weights = read_weights(directory / "source.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    for name, of in matrix.tensors.items():
        assert stored[name].tensor_type.name == type_name
        source = weights[name].reshape(len(of.counts), -1, weights[name].shape[-1])
        codes = stored[name].data.reshape(len(source), source.shape[1], -1)
        for expert, (weight, columns) in enumerate(zip(source, of.mean_squares, strict=True)):
            # what the file gives back: sums over counts, in float32
            columns = (columns * of.counts[expert]) / of.counts[expert]
            ours = ggml.quantize(weight, type_name, columns)
            np.testing.assert_array_equal(codes[expert], ours, err_msg=f"{name} {expert}")


def test_without_a_matrix_it_refuses_two_bits_and_with_ours_it_does_not(wide):
    directory, matrix = wide
    types = directory / "two_bits.txt"
    write_types(types, with_embeddings(dict.fromkeys(matrix.tensors, "IQ2_S"), 256))
    source, out = directory / "source.gguf", directory / "two_bits.gguf"
    with pytest.raises(LlamaError, match="importance matrix"):
        quantize(source, out, "Q2_K", "--tensor-type-file", types)
    quantize(
        source, out, "Q2_K", "--imatrix", directory / "matrix.gguf", "--tensor-type-file", types
    )
    ids = np.array([[1, 2, 3, 4]])
    assert np.isfinite(logits(out, ids)).all()


@pytest.mark.parametrize("with_matrix", [True, False])
def test_the_size_of_the_file_is_known_to_the_byte(wide, with_matrix):
    directory, matrix = wide
    names = ["Q3_K", "Q4_K", "Q6_K", "Q8_0"]
    chosen = {tensor: names[i % len(names)] for i, tensor in enumerate(matrix.tensors)}
    types = with_embeddings(chosen, 256)
    listed, path, out = directory / "mixed.txt", directory / "matrix.gguf", directory / "mixed.gguf"
    write_types(listed, types)
    use = ["--imatrix", path] if with_matrix else []
    quantize(directory / "source.gguf", out, "Q4_K_M", *use, "--tensor-type-file", listed)
    pairs = matrix_pairs(str(path), matrix.dataset, len(matrix.tensors), matrix.num_chunks)
    added = pairs if with_matrix else {}
    assert file_size(directory / "source.gguf", types, added) == out.stat().st_size
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert {name: stored[name] for name in types if name in stored} == {
        name: of for name, of in types.items() if name in stored
    }


def test_llama_cpp_and_its_weights_in_transformers_agree(wide):
    directory, matrix = wide
    out = directory / "Q4_K.gguf"
    types = directory / "four_bits.txt"
    write_types(types, with_embeddings(dict.fromkeys(matrix.tensors, "Q4_K"), 256))
    quantize(directory / "source.gguf", out, "Q4_K_M", "--tensor-type-file", types)
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    before = model.lm_head.weight.clone()
    put_in(model, out)
    assert not torch.equal(model.lm_head.weight, before)
    ids = torch.tensor(dataset(2, 32)["input_ids"])
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)
    found = torch.from_numpy(logits(out, ids.numpy())).log_softmax(-1)
    # it rounds inputs to 8 bits, which sends a few tokens to other experts
    assert (expected.exp() * (expected - found)).sum(-1).median() < 1e-3
