"""An importance matrix on disk is read back as it was, and says what llama.cpp looks for."""

import numpy as np
import pytest

pytest.importorskip("gguf")

import gguf

from moeq_plugin.integrations.llama_cpp.matrix_file import (
    Importance,
    ImportanceMatrix,
    read_matrix,
    write_matrix,
)


def matrix(**changes):
    rng = np.random.default_rng(0)
    tensors = {
        "blk.0.ffn_up_exps.weight": Importance(
            rng.random((3, 8), dtype=np.float32) + 0.1, np.array([5, 1, 7], dtype=np.float32)
        ),
        "blk.0.attn_q.weight": Importance(
            rng.random((1, 16), dtype=np.float32) + 0.1, np.array([12], dtype=np.float32)
        ),
    }
    given = {"tensors": tensors, "dataset": "text.jsonl", "num_chunks": 4, "chunk_size": 3}
    return ImportanceMatrix(**{**given, "borrowed": ("a.experts.1.up_proj",), **changes})


@pytest.mark.parametrize("borrowed", [(), ("a.experts.1.up_proj", "a.experts.2.up_proj")])
def test_it_is_read_back(tmp_path, borrowed):
    written = matrix(borrowed=borrowed)
    write_matrix(tmp_path / "m.gguf", written)
    found = read_matrix(tmp_path / "m.gguf")
    assert (found.dataset, found.num_chunks, found.chunk_size) == ("text.jsonl", 4, 3)
    assert found.borrowed == borrowed
    assert found.tensors.keys() == written.tensors.keys()
    for name, of in written.tensors.items():
        np.testing.assert_allclose(found.tensors[name].mean_squares, of.mean_squares, rtol=1e-6)
        np.testing.assert_array_equal(found.tensors[name].counts, of.counts)


def test_it_holds_what_llama_cpp_looks_for(tmp_path):
    write_matrix(tmp_path / "m.gguf", matrix())
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix" and "general.architecture" not in fields
    assert fields["imatrix.datasets"] == ["text.jsonl"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (4, 3)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    sums, counts = (tensors[f"blk.0.ffn_up_exps.weight.{part}"] for part in ("in_sum2", "counts"))
    assert sums.shape.tolist() == [8, 3] and counts.shape.tolist() == [1, 3]  # columns first
    of = matrix().tensors["blk.0.ffn_up_exps.weight"]
    np.testing.assert_allclose(sums.data, of.mean_squares * of.counts[:, None], rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_a_column_that_counts_nothing_is_refused(value):
    squares = np.ones((2, 4), dtype=np.float32)
    squares[1, 2] = value
    with pytest.raises(ValueError, match="every column"):
        Importance(squares, np.ones(2, dtype=np.float32))


def test_an_expert_without_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without tokens"):
        Importance(np.ones((2, 4), dtype=np.float32), np.array([1, 0], dtype=np.float32))


def test_another_file_is_not_a_matrix(tmp_path):
    text, model = tmp_path / "text", tmp_path / "model.gguf"
    text.write_text("nothing")
    with pytest.raises(ValueError, match="not a file of llama"):
        read_matrix(text)
    writer = gguf.GGUFWriter(model, "qwen3moe")
    writer.add_tensor("a", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="not an importance matrix"):
        read_matrix(model)
