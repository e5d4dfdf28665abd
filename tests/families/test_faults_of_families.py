"""What can go wrong around the experts of a family that is only known by building it, planted."""

import json
import shutil

import pytest

pytest.importorskip("llmcompressor")

from examination import command, examine
from safetensors.torch import load_file, save_file

# one that sees, one that is hybrid, one with an indexer
KINDS = ("qwen3_vl_moe", "nemotron_h", "deepseek_v32")


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    examined = examine(request.param, tmp_path_factory.mktemp(request.param))
    assert command("verify", examined.out, "--source", examined.source)[0] == 0
    return examined


def without(part):
    return lambda tensors: {n: t for n, t in tensors.items() if part not in n}


def swapped(tensors):
    """Give experts 0 and 1 each other's weights."""
    names = {"experts.0.": "experts.1.", "experts.1.": "experts.0."}
    changed = dict(tensors)
    for name in tensors:
        for one, other in names.items():
            if one in name:
                changed[name] = tensors[name.replace(one, other)]
    return changed


def coarse_router(tensors):
    """Round the first router to 16 steps, as a quantized one is."""
    name = next(n for n in sorted(tensors) if n.endswith("gate.weight"))
    step = tensors[name].abs().max() / 7
    return tensors | {name: (tensors[name] / step).round().clamp(-8, 7) * step}


FAULTS = {
    "dropped tower": (("qwen3_vl_moe",), without("visual."), "not-in-checkpoint"),
    "dropped part of a tower": (("qwen3_vl_moe",), without("patch_embed"), "not-in-checkpoint"),
    "missing indexer": (("deepseek_v32",), without("indexer."), "not-in-checkpoint"),
    "missing state": (("nemotron_h",), without("A_log"), "not-in-checkpoint"),
    "swapped experts": (KINDS, swapped, "swapped-expert"),
    "quantized router": (KINDS, coarse_router, "far-from-source"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_it_is_found(made, fault, tmp_path):
    families, damage, check = FAULTS[fault]
    if made.name not in families:
        pytest.skip(f"{made.name} has none")
    shutil.copytree(made.out, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    save_file(damage(load_file(path)), path, metadata={"format": "pt"})
    code, said = command("verify", tmp_path / "out", "--source", made.source)
    assert code == 1, said
    assert check in said, said
    as_json = command("verify", tmp_path / "out", "--source", made.source, "--json")[1]
    assert json.loads(as_json)["findings"]
