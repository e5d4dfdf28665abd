import struct

import pytest
from written_checkpoint import write_tensors

from moeq_plugin.report.stored import read_stored

SHAPE = ("I64", [2], struct.pack("<2q", 16, 32))


def test_bits_are_all_that_is_stored_for_a_quantized_weight_per_weight(tmp_path):
    packed = {
        "weight_packed": ("I32", [16, 4], bytes(256)),
        "weight_scale": ("BF16", [16], bytes(32)),
    }
    tensors = {f"a.{k}": v for k, v in {**packed, "weight_shape": SHAPE}.items()}
    tensors["a.bias"] = ("BF16", [16], bytes(32))
    tensors["norm.weight"] = ("BF16", [100], bytes(200))
    write_tensors(tmp_path / "model.safetensors", tensors)

    found = read_stored(tmp_path)

    assert found.num_bytes == 256 + 32 + 16 + 32 + 200
    assert (found.quantized_weights, found.quantized_bytes) == (16 * 32, 256 + 32 + 16)
    assert found.bits_per_weight == 8 * 304 / 512
    assert found.num_weights == 512 + 16 + 100
    assert found.quantized_share == 512 / 628


def test_eight_bit_floats_count_by_their_shape_and_four_bit_ones_two_to_a_byte(tmp_path):
    eight = {"a.weight": ("F8_E4M3", [4, 8], bytes(32)), "a.weight_scale": ("F32", [1], bytes(4))}
    four = {
        "b.weight_packed": ("U8", [4, 4], bytes(16)),
        "b.weight_scale": ("F8_E4M3", [4], bytes(4)),
    }
    write_tensors(tmp_path / "1.safetensors", eight)
    write_tensors(tmp_path / "2.safetensors", four)

    found = read_stored(tmp_path)

    assert (found.quantized_weights, found.quantized_bytes) == (32 + 32, 36 + 20)


def test_shapes_of_32_bits_are_read_too(tmp_path):
    tensors = {
        "a.weight_packed": ("I32", [16, 4], bytes(256)),
        "a.weight_shape": ("I32", [2], struct.pack("<2i", 16, 32)),
    }
    write_tensors(tmp_path / "model.safetensors", tensors)
    assert read_stored(tmp_path).quantized_weights == 512


@pytest.mark.parametrize("cut", [0, 8])
def test_a_shape_that_is_not_in_the_file_is_said(tmp_path, cut):
    dtype = "I64" if cut else "F64"
    path = tmp_path / "m.safetensors"
    write_tensors(path, {"a.weight_shape": (dtype, [2], bytes(16))})
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    with pytest.raises(ValueError, match=r"m\.safetensors: a\.weight_shape cannot be read"):
        read_stored(tmp_path)


def test_a_model_in_16_bit_has_no_bits_per_quantized_weight(tmp_path):
    write_tensors(tmp_path / "m.safetensors", {"a.weight": ("BF16", [4, 8], bytes(64))})
    assert read_stored(tmp_path).bits_per_weight is None


def test_a_directory_without_weights_has_no_sizes(tmp_path):
    assert read_stored(tmp_path) is None


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 20, (9).to_bytes(8, "little") + b"{nonsense"]
)
def test_what_is_not_a_safetensors_file_is_said(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.safetensors is not a safetensors file"):
        read_stored(tmp_path)
