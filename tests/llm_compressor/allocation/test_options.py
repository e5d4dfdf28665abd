import pytest
import torch

pytest.importorskip("llmcompressor")

from moeq_plugin.core.codebook import CodebookFormat, encode
from moeq_plugin.core.packed_codebook import PackedFormat
from moeq_plugin.integrations.llm_compressor.allocation.options import parse_option, parse_options


def test_a_preset_means_what_it_means_to_the_host():
    args = parse_option("W3A16").scheme.weights
    assert (args.num_bits, args.group_size, args.symmetric) == (3, 128, True)


def test_another_group_size_is_appended():
    args = parse_option("W4A16_ASYM_G32").scheme.weights
    assert (args.num_bits, args.group_size, args.symmetric) == (4, 32, False)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["W4A16"], "at least two different schemes"),
        (["W4A16", "W4A16"], "at least two different schemes"),
        (["W4A16", "W4A61"], r"'W4A61' is not an option; did you mean \['W4A16'"),
        (["W4A16", "NVFP4"], "'NVFP4' has no integer weights"),
    ],
)
def test_refuses(names, message):
    with pytest.raises(ValueError, match=message):
        parse_options(names)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("W2A16_G64", 2 + 16 / 64), ("W3A16_G64", 3 + 16 / 64), ("W4A16_ASYM_G64", 4 + 20 / 64)],
)
def test_bytes_are_codes_scales_and_zero_points(name, bits):
    linear = torch.nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    shape_tensor = 16
    assert parse_option(name).num_bytes(linear) - shape_tensor == bits / 8 * 256 * 128


def test_an_option_that_does_not_fit_leaves_the_linear_as_it_is():
    linear = torch.nn.Linear(48, 8, bias=False, dtype=torch.bfloat16)
    option = parse_option("W4A16_G64")
    assert not option.fits(linear)
    assert option.num_bytes(linear) == 48 * 8 * 2


def test_a_codebook_is_spelled_by_its_format():
    option = parse_option("CB6D2_G64x32")
    assert option.codebook == CodebookFormat(6, 2, group_rows=64, group_columns=32)
    assert option.describe() == "codebook 6 bit per 2, 64 x 32"
    assert not option.is_exact
    with pytest.raises(ValueError, match="index_bits must be 1 to 12, got 13"):
        parse_option("CB13D2_G64x32")


@pytest.mark.parametrize("name", ["CB6D2_G64x32", "CB3D1_G16x32", "CB5D4_G24x64"])
def test_the_bytes_of_a_codebook_are_those_of_its_tensor(name):
    linear = torch.nn.Linear(128, 48, bias=False, dtype=torch.bfloat16)
    option = parse_option(name)
    encoded = encode(linear.weight.detach(), option.codebook)
    assert option.num_bytes(linear) == PackedFormat.of(encoded).pack(encoded).nbytes


def test_vectors_that_do_not_divide_the_columns_do_not_fit():
    option = parse_option("CB5D4_G24x64")
    assert option.fits(torch.nn.Linear(12, 2))
    assert not option.fits(torch.nn.Linear(10, 2))
