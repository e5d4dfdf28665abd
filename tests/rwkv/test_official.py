"""Official checkpoints are read and written as they are, or refused with all that is wrong."""

import struct
from pathlib import Path

import pytest
import torch
from rwkv_models import VERSIONS, rwkv_tokens, tiny_rwkv
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from moeq_plugin.rwkv import (
    RWKV6ForCausalLM,
    RWKV7ForCausalLM,
    from_official,
    load_pth,
    to_official,
)
from moeq_plugin.rwkv.loading import load_fla_folder

REAL = Path(__file__).parents[3] / "shared/data/rwkv"
NORMS = ["ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias", "att.ln_x.weight", "att.ln_x.bias"]
BLOCK = {
    "rwkv6": [
        *(f"att.time_maa_{x}" for x in ("x", "w", "k", "v", "r", "g", "w1", "w2")),
        *("att.time_decay", "att.time_decay_w1", "att.time_decay_w2", "att.time_faaaa"),
        *(f"att.{x}.weight" for x in ("receptance", "key", "value", "gate", "output")),
        *("ffn.time_maa_k", "ffn.time_maa_r"),
        *(f"ffn.{x}.weight" for x in ("key", "receptance", "value")),
    ],
    "rwkv7": [
        *(f"att.x_{x}" for x in "rwkvag"),
        *(f"att.{x}{i}" for x in "wav" for i in range(3)),
        *("att.g1", "att.g2", "att.k_k", "att.k_a", "att.r_k"),
        *(f"att.{x}.weight" for x in ("receptance", "key", "value", "output")),
        *("ffn.x_k", "ffn.key.weight", "ffn.value.weight"),
    ],
}
SHAPES = {
    "rwkv6": {
        "blocks.1.att.time_maa_w1": (32, 20),
        "blocks.1.att.time_maa_w2": (5, 4, 32),
        "blocks.1.att.time_decay": (1, 1, 32),
        "blocks.1.att.time_decay_w1": (32, 8),
        "blocks.1.att.time_decay_w2": (8, 32),
        "blocks.1.att.time_faaaa": (2, 16),
        "blocks.1.ffn.time_maa_k": (1, 1, 32),
    },
    "rwkv7": {
        "blocks.1.att.w0": (1, 1, 32),
        "blocks.1.att.w1": (32, 8),
        "blocks.1.att.w2": (8, 32),
        "blocks.1.att.v1": (32, 4),
        "blocks.1.att.g2": (10, 32),
        "blocks.1.att.x_r": (1, 1, 32),
        "blocks.1.att.r_k": (2, 16),
        "blocks.1.ffn.key.weight": (128, 32),
    },
}


def official_names(version):
    names = {"emb.weight", "head.weight", "ln_out.weight", "ln_out.bias"}
    names |= {"blocks.0.ln0.weight", "blocks.0.ln0.bias"}
    names |= {f"blocks.{i}.{name}" for i in range(3) for name in NORMS + BLOCK[version]}
    return names - {f"blocks.0.att.v{i}" for i in range(3)}


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture
def tensors(version):
    return to_official(tiny_rwkv(version).state_dict())


def real_file(name):
    if not (REAL / name).exists():
        pytest.skip("needs ../shared/data/rwkv, reference data beside a development checkout")
    return REAL / name


def test_names_and_shapes_are_the_official_ones(version, tensors):
    assert set(tensors) == official_names(version)
    for name, shape in SHAPES[version].items():
        assert tensors[name].shape == shape, name
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_reading_undoes_writing(version, dtype, tmp_path):
    model = tiny_rwkv(version, intermediate_size=40).to(dtype)
    torch.save(to_official(model.state_dict()), tmp_path / "model.pth")

    loaded = type(model).from_pretrained(tmp_path / "model.pth")

    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.dtype == dtype
    assert loaded.config.to_diff_dict() | {"dtype": None} == model.config.to_diff_dict() | {
        "dtype": None
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert load_pth(tmp_path / "model.pth", dtype=torch.float64).dtype == torch.float64


def test_vectors_may_lack_their_leading_ones_and_layer_0_may_have_values_to_mix(version, tensors):
    expected = from_official(tensors)
    spare = {f"blocks.0.att.v{index}": torch.zeros(1) for index in range(3)}

    loaded = from_official({name: x.squeeze() for name, x in tensors.items()} | spare)

    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def write_as_fla(model, folder):
    """Save a model in the names of flash-linear-attention, by its configuration's name too."""
    model.config.save_pretrained(folder)
    projections = {"receptance": "r", "key": "k", "value": "v", "output": "o"}
    top = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}
    norms = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm", "ffn": "ffn"}
    tensors = {}
    for name, tensor in to_official(model.state_dict()).items():
        first, *rest = name.split(".")
        if first in top:
            tensors[f"{top[first]}.{rest[0]}"] = tensor
            continue
        index, part, *rest = rest
        place = f"model.layers.{index}.{norms.get(part, 'attn')}"
        if part == "att" and rest[0] in projections:
            tensors[f"{place}.{projections[rest[0]]}_proj.weight"] = tensor
        elif part == "att" and rest[0] == "ln_x":
            tensors[f"{place}.g_norm.{rest[1]}"] = tensor
        elif part == "att" and rest[0][-1] in "012":
            kind = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[rest[0][-1]]
            tensors[f"{place}.{rest[0][0]}_lora.lora.{kind}"] = tensor.squeeze().T.contiguous()
        else:
            tensors[".".join([place, *rest])] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_a_folder_of_flash_linear_attention_is_read_too(tmp_path):
    model = tiny_rwkv("rwkv7")
    write_as_fla(model, tmp_path)

    by_name, by_tensors = AutoModelForCausalLM.from_pretrained(tmp_path), load_fla_folder(tmp_path)

    for loaded in (by_name, by_tensors):
        assert type(loaded) is RWKV7ForCausalLM
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match="is for RWKV7ForCausalLM, not for RWKV6ForCausalLM"):
        RWKV6ForCausalLM.from_pretrained(tmp_path)


def test_a_class_of_ones_own_is_what_its_from_pretrained_returns(version, tensors, tmp_path):
    class Mine({"rwkv6": RWKV6ForCausalLM, "rwkv7": RWKV7ForCausalLM}[version]):
        pass

    torch.save(tensors, tmp_path / "model.pth")

    assert type(Mine.from_pretrained(tmp_path / "model.pth")) is Mine
    assert type(Mine.from_official(tensors)) is Mine


def test_sizes_are_read_from_the_tensors_alone(version):
    model = tiny_rwkv(version, num_hidden_layers=2, intermediate_size=40, decay_low_rank_dim=5)

    read = type(model.config).of_tensors(to_official(model.state_dict()))

    assert read.to_dict() == model.config.to_dict()


def test_a_file_of_the_other_version_is_refused(version, tensors, tmp_path):
    torch.save(tensors, tmp_path / "model.pth")
    ours, other = RWKV7ForCausalLM, RWKV6ForCausalLM
    if version == "rwkv6":
        ours, other = other, ours

    with pytest.raises(ValueError, match=f"is for {ours.__name__}, not for {other.__name__}"):
        other.from_pretrained(tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"which takes no \['device_map'\]; load it, save_pre"):
        ours.from_pretrained(tmp_path / "model.pth", device_map="auto")


def test_all_missing_and_unexpected_tensors_are_named(version, tensors):
    del tensors["ln_out.bias"], tensors["blocks.2.ffn.value.weight"]
    tensors["blocks.1.ffn.s_emb.weight"] = tensors["extra"] = torch.zeros(1)

    message = (
        r"RWKV-. of 3 layers and 32 channels. Missing: blocks.2.ffn.value.weight, ln_out.bias. "
        r"Unexpected: blocks.1.ffn.s_emb.weight, extra$"
    )
    with pytest.raises(ValueError, match=message):
        from_official(tensors)


def test_one_tensor_too_many_or_too_few_is_enough(tensors):
    with pytest.raises(ValueError, match="Missing: none. Unexpected: extra$"):
        from_official({**tensors, "extra": torch.zeros(1)})
    del tensors["ln_out.bias"]
    with pytest.raises(ValueError, match="Missing: ln_out.bias. Unexpected: none$"):
        from_official(tensors)


def test_another_layout_is_refused_with_its_names():
    path = real_file("260123_reverse_L2_only_rwkv7.pth")

    with pytest.raises(ValueError, match=r"Missing: blocks.0.att.a0, .* Unexpected: e.weight, .*"):
        load_pth(path)
    with pytest.raises(ValueError, match="Missing: .* and [0-9]+ more. Unexpected: none"):
        from_official({"blocks.5.att.r_k": torch.zeros(2, 4)})


def test_tensors_that_contradict_the_sizes_are_named(tensors):
    tensors["blocks.1.ln1.weight"] = torch.zeros(31)
    tensors["blocks.2.ffn.key.weight"] = torch.zeros(32, 5)

    with pytest.raises(
        ValueError, match=r"'blocks.1.ln1.weight \[31\]', 'blocks.2.ffn.key.weight \[32, 5\]'"
    ):
        from_official(tensors)


def read_rwkv_cpp(path):
    """Return the tensors of an rwkv.cpp file under official names and in official shapes.

    Its factors of low rank are stored as the weights of linears, the six shifts as one tensor.
    """
    data, tensors, offset = path.read_bytes(), {}, 24
    while offset < len(data):
        dimensions, length, kind = struct.unpack_from("<3I", data, offset)
        assert kind == 0, "not float32"
        shape = struct.unpack_from(f"<{dimensions}I", data, offset + 12)
        offset += 12 + 4 * dimensions
        name = data[offset : offset + length].decode()
        size = torch.Size(shape).numel()
        offset += length
        values = torch.frombuffer(bytearray(data[offset : offset + 4 * size]), dtype=torch.float32)
        offset += 4 * size
        tensor = values.view(*reversed(shape))
        last = name.rpartition(".")[2]
        if last == "x_rwkvag":
            names = [name.removesuffix("rwkvag") + letter for letter in "rwkvag"]
            tensors |= dict(zip(names, tensor, strict=True))
        elif last.endswith(("1", "2")):
            tensors[name] = tensor.mT
        else:
            tensors[name] = tensor.flatten() if last == "time_decay" else tensor.squeeze(-1)
    return tensors


@pytest.mark.parametrize("name", ["6v0-1m", "7v0-834K"])
@torch.no_grad()
def test_real_weights_give_the_logits_that_rwkv_cpp_expects(name):
    model = from_official(read_rwkv_cpp(real_file(f"tiny-rwkv-{name}-FP32.bin")))
    data = bytearray(real_file(f"expected-logits-{name}.bin").read_bytes())
    expected = torch.frombuffer(data, dtype=torch.float32)

    actual = model(torch.tensor([list(b'"in')])).logits[0, -1]

    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def trained_blocks():
    """Return the RWKV-7 parts of a trained network of another layout as one of ours."""
    path = real_file("260123_reverse_L2_only_rwkv7.pth")
    toy = torch.load(path, map_location="cpu", weights_only=True)
    parts = {"e.": "emb.", "o.": "head.", "lno.": "ln_out.", "ln1a.": "blocks.0.ln0."}
    for index in range(2):
        parts |= {
            f"rwkv{index + 1}.": f"blocks.{index}.att.",
            f"ffn{index + 1}.": f"blocks.{index}.ffn.",
        }
    tensors = {
        new + name.removeprefix(old): tensor
        for old, new in parts.items()
        for name, tensor in toy.items()
        if name.startswith(old) and name != "o.bias"
    }
    for index in range(2):
        for ours, theirs in (("ln1", "a"), ("ln2", "c")):
            for kind in ("weight", "bias"):
                tensors[f"blocks.{index}.{ours}.{kind}"] = toy[f"ln{index + 1}{theirs}.{kind}"]
    return from_official(tensors)


@torch.no_grad()
def test_trained_weights_read_a_long_text_as_they_read_it_token_by_token():
    model = trained_blocks()
    ids = rwkv_tokens(1, 70) % 12

    state, steps = None, []
    for token in ids.split(1, dim=1):
        output = model(token, state=state)
        state = output.state
        steps.append(output.logits)

    torch.testing.assert_close(torch.cat(steps, 1), model(ids).logits, atol=1e-4, rtol=0)
