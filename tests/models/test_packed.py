"""Packed modules are the plain ones whose weights were encoded."""

import pytest
import torch
from torch import nn

from moeq_plugin.core.codebook import CodebookFormat, encode
from moeq_plugin.core.packed_codebook import PackedFormat
from moeq_plugin.models.elementwise import ElementwiseScale
from moeq_plugin.models.packed import (
    CodebookLinear,
    CodebookScale,
    pack_modules,
    packed_modules,
    unpack_modules,
)

LINEAR = CodebookFormat(4, 2, group_rows=5, group_columns=16)
ROW = CodebookFormat(3, 1, group_rows=1, group_columns=48)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    result = nn.ModuleDict(
        {
            "linear": nn.Linear(24, 18),
            "plain": nn.Linear(24, 18),
            "shift": ElementwiseScale(1, 1, 24, first=0.0, last=1.0),
            "heads": ElementwiseScale(3, 8, first=-1.0, last=1.0),
        }
    )
    return result.to(dtype)


def packed(dtype=torch.float32):
    plain, result = model(dtype), model(dtype)
    encoded = {}
    for name, form in {"linear": LINEAR, "shift": ROW, "heads": ROW}.items():
        weight = plain[name].weight.detach()
        encoded[name] = encode(weight if name == "linear" else weight.reshape(1, -1), form)
    pack_modules(result, {name: PackedFormat.of(weight) for name, weight in encoded.items()})
    for name, weight in encoded.items():
        result[name].fill(PackedFormat.of(weight).pack(weight))
    return plain, result


FORMS = [
    CodebookFormat(1, 1, group_rows=9, group_columns=99),  # one codebook of two bytes
    CodebookFormat(3, 3, group_rows=2, group_columns=6),
    LINEAR,
    CodebookFormat(12, 8, group_rows=9, group_columns=8),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_was_packed_is_unpacked(form, dtype):
    encoded = encode(torch.randn(7, 24, generator=torch.Generator().manual_seed(0)).to(dtype), form)
    packed_form = PackedFormat.of(encoded)

    words = packed_form.pack(encoded)

    assert words.dtype == torch.int32
    assert len(words) == packed_form.num_words((7, 24))
    again = packed_form.unpack(words, (7, 24))
    for name in ("codes", "codebook", "scale"):
        found, expected = getattr(again, name), getattr(encoded, name)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_running_packed_is_running_the_encoded_weight(dtype):
    plain, ours = packed(dtype)
    x, y = torch.randn(2, 5, 24).to(dtype), torch.randn(2, 5, 3, 8)

    with torch.no_grad():
        plain["linear"].weight.copy_(encode(plain["linear"].weight, LINEAR).decode())
        for name in ("shift", "heads"):
            weight = plain[name].weight
            weight.copy_(encode(weight.reshape(1, -1), ROW).decode().view_as(weight))

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert torch.allclose(ours["linear"](x), plain["linear"](x), rtol=tolerance, atol=tolerance)
    assert torch.equal(ours["shift"](x), plain["shift"](x))
    assert torch.equal(ours["heads"](y), plain["heads"](y))  # float32 inputs of a bfloat16 weight
    assert ours["linear"](x).dtype == dtype


def test_unpacking_gives_plain_modules_with_the_same_outputs():
    _, ours = packed(torch.bfloat16)
    x, y = torch.randn(2, 24).bfloat16(), torch.randn(2, 3, 8)
    before = ours["linear"](x), ours["shift"](x), ours["heads"](y)

    unpack_modules(ours)

    assert packed_modules(ours) == {}
    assert [type(ours[n]) for n in ("linear", "shift", "heads")] == [
        nn.Linear, ElementwiseScale, ElementwiseScale,
    ]  # fmt: skip
    assert ours["heads"].weight.shape == (3, 8)
    after = ours["linear"](x), ours["shift"](x), ours["heads"](y)
    assert torch.allclose(before[0], after[0], rtol=2e-2, atol=2e-2)  # another order of summation
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))


def test_the_state_holds_indices_codebooks_and_scales_only():
    _, ours = packed(torch.bfloat16)

    state = ours.state_dict()

    codes, codebook, scale = 4 * -(-18 * 12 // 32) * 4, 4 * 2 * 16 * 2, 2 * 4 * 2  # bytes
    assert {k: (v.dtype, v.numel()) for k, v in state.items() if k.startswith("linear.")} == {
        "linear.packed": (torch.int32, (codes + codebook + scale) // 4),
        "linear.bias": (torch.bfloat16, 18),
    }
    fresh = model(torch.bfloat16)
    pack_modules(fresh, {name: module.form for name, module in packed_modules(ours).items()})
    fresh.load_state_dict(state)
    assert torch.equal(fresh["linear"].weight, ours["linear"].weight)


def test_casting_the_model_casts_the_weight():
    _, ours = packed()

    ours.to(torch.float16)

    assert ours["linear"].weight.dtype == torch.float16
    assert ours["linear"](torch.randn(2, 24).half()).dtype == torch.float16


def test_modules_that_were_not_named_stay():
    plain, ours = packed()

    assert list(packed_modules(ours)) == ["linear", "shift", "heads"]
    assert torch.equal(ours["plain"].weight, plain["plain"].weight)
    assert isinstance(ours["linear"], CodebookLinear)
    assert isinstance(ours["heads"], CodebookScale)


@pytest.mark.parametrize(("name", "found"), [("no.such", "no module"), ("norm", "LayerNorm")])
def test_refuses_what_cannot_be_packed(name, found):
    ours = nn.ModuleDict({"norm": nn.LayerNorm(3)})

    with pytest.raises(ValueError, match=f"{name} should be a linear .* has {found}"):
        pack_modules(ours, {name: PackedFormat(scale_dtype="float32")})
