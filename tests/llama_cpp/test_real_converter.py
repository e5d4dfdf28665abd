"""What llama.cpp's own converter writes of a model has a row of our matrix for every tensor."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("llmcompressor")
pytest.importorskip("gguf")

import gguf
from gguf_model import read_weights
from helpers import oneshot, tiny_model, tokens
from real_llama import CONVERTER, logits, quantize
from tiny_families import save_tiny
from transformers import AutoModelForCausalLM

from moeq_plugin.integrations.llama_cpp.conversion import conversion_of, parts_of, with_parts
from moeq_plugin.integrations.llama_cpp.file_sizes import file_size, left_as_they_are, matrix_pairs
from moeq_plugin.integrations.llama_cpp.matrix_file import write_matrix
from moeq_plugin.integrations.llama_cpp.modifier import ImportanceModifier
from moeq_plugin.integrations.llama_cpp.tensor_names import tensor_names
from moeq_plugin.integrations.llama_cpp.tensor_types import EMBEDDINGS
from moeq_plugin.integrations.llama_cpp.type_files import with_embeddings, write_types
from moeq_plugin.integrations.llm_compressor.allocation.target_linears import target_linears
from moeq_plugin.models.linear_experts import linear_moe_layers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.llama,
    pytest.mark.skipif(not CONVERTER.exists(), reason="no llama.cpp: run `make llama` first"),
]
PROBE = Path(__file__).with_name("converter_probe.py")
# blocks have 32 columns
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
LIKE_BASE = {"qwen3_moe": {}, "deepseek_v2": LATENT}


def save(family, directory):
    """Save a random model, with experts in every layer, as llama.cpp knows these families."""
    if family in LIKE_BASE:
        return tiny_model(family, directory, **LIKE_BASE[family])
    return save_tiny(family, directory, mlp_only_layers=[])


@pytest.fixture(
    scope="module", params=["qwen3_moe", "deepseek_v2", "qwen3_5_moe_text", "qwen3_next"]
)
def converted(request, tmp_path_factory):
    """A model, what the converter made of it, and our matrix with the names of its tensors."""
    directory = tmp_path_factory.mktemp(request.param)
    model = save(request.param, directory / "model").to(torch.bfloat16)
    model.save_pretrained(directory / "model")
    source = directory / "source.gguf"
    command = [sys.executable, PROBE, CONVERTER, directory / "model", source]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    modifier = ImportanceModifier(dataset_name="random tokens")
    oneshot(model, modifier)
    write_matrix(directory / "matrix.gguf", modifier.matrix)
    config = model.config
    linears = target_linears(model, linear_moe_layers(model), ["Linear"], ["lm_head"])
    names = tensor_names(linears.values(), config.model_type)
    return model, source, modifier.matrix, names


def energies(weight, rows):
    """``[rows, in]``: what stays the same of columns however the converter orders outputs."""
    return np.square(weight.astype(np.float64)).reshape(rows, -1, weight.shape[-1]).sum(1)


def test_every_column_is_where_the_matrix_has_it(converted):
    model, source, matrix, names = converted
    weights = read_weights(source)
    conversion = conversion_of(model, {model.get_submodule(n): n for n in names}, names)
    for tensor in set(names.values()):
        modules = [name for name, of in names.items() if of == tensor]
        expected = []
        for name in modules:
            linear = model.get_submodule(name).weight.detach()
            order = conversion.orders.get(name, torch.arange(linear.shape[1]))
            expected.append(linear[:, order].numpy())
        rows = len(matrix.tensors[tensor].counts)
        parts = parts_of(modules[0], tensor) or (tensor,)
        if tensor.endswith("attn_v_b.weight"):  # of each head, what is made of keys comes first
            heads = expected[0].reshape(rows, 64, -1)
            keys = weights[tensor.replace("_v_", "_k_")]
            np.testing.assert_array_equal(keys, heads[:, :32].transpose(0, 2, 1))
            assert matrix.tensors[tensor.replace("_v_", "_k_")].mean_squares.shape == (rows, 32)
            expected = heads[:, 32:]
        found = sum(energies(weights[part], rows) for part in parts)
        np.testing.assert_allclose(found, energies(np.stack(expected), rows), err_msg=tensor)


def test_every_tensor_has_a_row_and_the_size_is_known(converted, tmp_path):
    model, source, matrix, names = converted
    types = with_parts(dict.fromkeys(names.values(), "Q4_0"), names)
    types = with_embeddings(types, model.config.hidden_size)
    types |= left_as_they_are(source, types)  # what stays in 16 bit by default
    out, listed, path = tmp_path / "out.gguf", tmp_path / "types.txt", source.parent / "matrix.gguf"
    write_types(listed, types)
    said = quantize(source, out, "Q4_0", "--imatrix", path, "--tensor-type-file", listed)
    missing = [line for line in said.splitlines() if "did not find weights for" in line]
    without = [line for line in missing if not line.rstrip().endswith(EMBEDDINGS)]
    assert without == []
    added = matrix_pairs(str(path), matrix.dataset, len(matrix.tensors), matrix.num_chunks)
    assert file_size(source, types, added) == out.stat().st_size
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert all(stored[name] == of for name, of in types.items() if name in stored)
    assert all(name in types for name, of in stored.items() if of not in ("F32", "BF16"))


def test_llama_cpp_computes_what_transformers_does(converted):
    model, source, *_ = converted
    if model.config.model_type == "qwen3_5_moe_text":
        pytest.skip("llama.cpp has sections of positions for heads of 256 columns only")
    ids = tokens(2, 24)
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)
    found = torch.from_numpy(logits(source, ids.numpy())).log_softmax(-1)
    assert (expected.exp() * (expected - found)).sum(-1).median() < 1e-3
