"""Zero points that are one off are found without a source; signs of scales are not taken for it."""

import pytest
import torch
from checkpoints import copy_of, edited_tensors
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from helpers import int4, oneshot, tiny_model

from moeq_plugin import MoEQuantModifier, verify_checkpoint

pytest.importorskip("llmcompressor")

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a checkpoint of a tiny model in a scheme, made when it is first asked for."""
    root, known = tmp_path_factory.mktemp("zero points"), {}

    def get(num_bits, group_size, symmetric):
        key = (num_bits, group_size, symmetric)
        if key not in known:
            directory = root / "-".join(map(str, key))
            model = tiny_model("qwen3_moe", directory / "model")
            groups = int4(group_size, num_bits=num_bits, symmetric=symmetric)
            oneshot(model, MoEQuantModifier(config_groups=groups, ignore=["lm_head"]))
            known[key] = directory / "out"
            model.save_pretrained(known[key])
        return known[key]

    return get


def set_codes(path, num_bits, make):
    """Write other codes and scales of one linear of symmetric weights into a checkpoint."""
    with edited_tensors(path) as tensors:
        shape = torch.Size(tensors[f"{Q_PROJ}.weight_shape"].tolist())
        words, scales = (tensors[f"{Q_PROJ}.weight_{part}"] for part in ("packed", "scale"))
        codes, scales = make(unpack_from_int32(words, num_bits, shape), scales)
        tensors[f"{Q_PROJ}.weight_packed"] = pack_to_int32(codes.to(torch.int8), num_bits)
        tensors[f"{Q_PROJ}.weight_scale"] = scales


def of_signed_grid(num_bits, step, seed=0):
    """Round random weights on grids whose lowest code is the largest weight of each group."""

    def make(codes, scales):
        middle = 1 << (num_bits - 1)
        generator = torch.Generator().manual_seed(seed)
        groups = torch.randn(*scales.shape, codes.shape[1] // scales.shape[1], generator=generator)
        largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        scale = -largest / middle
        rounded = (groups / scale).round() + step
        return rounded.clamp(-middle, middle - 1).reshape(codes.shape), scale[..., 0]

    return make


def zero_point_errors(path):
    return {f.where for f in verify_checkpoint(path).errors if f.check == "zero-point"}


@pytest.mark.parametrize("group_size", [8, 16, 32])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_the_signs_of_scales_are_no_zero_points_that_are_off(num_bits, group_size, made, tmp_path):
    path = copy_of(made(num_bits, group_size, True), tmp_path / "out")
    assert zero_point_errors(path) == set()
    for seed in range(4):  # the most uneven codes that there are
        set_codes(path, num_bits, of_signed_grid(num_bits, 0, seed))
        assert zero_point_errors(path) == set()


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("num_bits", [2, 3])
def test_codes_that_are_one_off_are_found_on_signed_grids(num_bits, step, made, tmp_path):
    path = copy_of(made(num_bits, 16, True), tmp_path / "out")
    set_codes(path, num_bits, of_signed_grid(num_bits, step))
    assert zero_point_errors(path) == {Q_PROJ}


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("num_bits", [2, 3, 4])
def test_stored_zero_points_that_are_one_off_are_found(num_bits, step, made, tmp_path):
    """As where one version of a format is read as another; modulo the number of codes."""
    path = copy_of(made(num_bits, 32, False), tmp_path / "out")
    assert zero_point_errors(path) == set()
    names = []
    with edited_tensors(path) as tensors:
        for name in [name for name in tensors if name.endswith("weight_zero_point")]:
            rows = int(tensors[name.replace("zero_point", "shape")][0])
            zeros = unpack_from_int32(
                tensors[name], num_bits, torch.Size((rows, tensors[name].shape[1])), packed_dim=0
            )
            middle = 1 << (num_bits - 1)
            moved = (zeros.int() + step + middle) % (2 * middle) - middle
            tensors[name] = pack_to_int32(moved.to(torch.int8), num_bits, packed_dim=0)
            names.append(name.removesuffix(".weight_zero_point"))
    found = zero_point_errors(path)
    assert len(found) >= 0.9 * len(names)
