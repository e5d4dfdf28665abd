"""A packed linear is the one that compressed-tensors decompresses."""

import copy
import io

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import nn

from moeq_plugin.models.packed_grid import GridLinear

SHAPE = 40, 96


def stored(num_bits, symmetric, group_size, dtype=torch.float32):
    """Return what compressed-tensors stores of a random weight, and what it reads from that."""
    generator = torch.Generator().manual_seed(num_bits)
    groups = SHAPE[1] // group_size if group_size else 1
    low, high = -(1 << num_bits - 1), (1 << num_bits - 1) - 1
    scale = (torch.rand(SHAPE[0], groups, generator=generator) * 0.1 + 0.01).to(dtype)
    zero_point = torch.zeros(SHAPE[0], groups, dtype=torch.int8)
    if not symmetric:
        zero_point = torch.randint(low, high + 1, zero_point.shape, generator=generator).to(
            torch.int8
        )
    codes = torch.randint(low, high + 1, SHAPE, generator=generator).view(SHAPE[0], groups, -1)
    weight = ((codes - zero_point[..., None]) * scale[..., None]).flatten(1).to(dtype)
    args = QuantizationArgs(
        num_bits=num_bits,
        symmetric=symmetric,
        group_size=group_size,
        strategy="group" if group_size else "channel",
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = compressor.compress(state, scheme)
    return packed, compressor.decompress(packed, scheme)["weight"]


def module_of(packed, num_bits, bias=None):
    zero_point = packed.get("weight_zero_point")
    words, scale = packed["weight_packed"], packed["weight_scale"]
    return GridLinear(words, scale, zero_point, SHAPE, num_bits, bias)


@pytest.mark.parametrize("group_size", [None, 32, 48], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_weight_and_product_are_those_of_compressed_tensors(num_bits, symmetric, group_size):
    packed, weight = stored(num_bits, symmetric, group_size)
    bias = nn.Parameter(torch.randn(SHAPE[0]))
    module = module_of(packed, num_bits, bias)
    x = torch.randn(2, 3, SHAPE[1])

    assert torch.equal(module.weight, weight)
    expected = nn.functional.linear(x, weight, bias)
    with torch.no_grad():
        assert torch.allclose(module(x), expected, rtol=1e-4, atol=1e-4)
        assert torch.allclose(module.unpacked()(x), expected, rtol=1e-4, atol=1e-4)


def test_its_tensors_are_those_of_compressed_tensors():
    packed, _ = stored(3, False, 32, torch.bfloat16)
    state = module_of(packed, 3).state_dict()
    assert state.keys() == packed.keys()
    assert all(torch.equal(state[name], packed[name]) for name in packed)


def test_gradients_reach_the_activations():
    packed, weight = stored(4, True, 32)
    x = torch.randn(2, SHAPE[1], requires_grad=True)
    module_of(packed, 4)(x).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand_as(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle"])
def test_a_copy_runs_on_tensors_of_its_own(duplicate):
    packed, weight = stored(4, True, 32)
    module, x = module_of(packed, 4), torch.randn(1, SHAPE[1])
    with torch.no_grad():
        expected = module(x)
        if duplicate == "deepcopy":
            other = copy.deepcopy(module)
        else:
            file = io.BytesIO()
            torch.save(module, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        module.weight_packed.zero_()
        module.weight_scale.zero_()
        assert torch.equal(other(x), expected)
        assert torch.equal(module(x), torch.zeros_like(expected))  # its own have changed
