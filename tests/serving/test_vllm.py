"""Checkpoints load in real vLLM, every expert in its place, and compute what was quantized.

vLLM lives in an environment of its own (`make vllm-env`): it pins another compressed-tensors than
llm-compressor needs. One process there (``vllm_probe.py``) loads all checkpoints one after another
and returns hashes of the expert buffers and log-probabilities; everything is judged here.

How far may vLLM be from transformers? Both are given the same plain weights (the *dequantized*
checkpoint) and the mean KL divergence between them is the *floor*: two programs, one model. The
quantized checkpoint holds the same values, so it may not be further than three times the floor.
Where vLLM's integer kernels are replaced by exact products all of this is in float32 and the floor
is rounding noise, about 1e-13. The stock kernels compute in bfloat16 and round activations to 8
bits: what that costs is measured by rounding the inputs of the replaced kernels alike, and added.

W8A8 rounds inputs in both programs, and noise decides what becomes of an input between two codes.
compressed-tensors puts one there: a token's largest, if negative, is 127.5 steps from zero. One
input of a hundred or more in some tokens is a few percent of what all rounding costs: a tenth of
that is granted to the mean, nothing to the quarter of the tokens that are nearest. Without rounding
or with the 127 steps of vLLM's kernels the distance is that cost or more, in all tokens.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_checkpoints import (
    PROJECTIONS,
    Checkpoint,
    quantized_checkpoint,
    random_ids,
    reference_logprobs,
)
from vllm_probe import fingerprint

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
CPUINFO = Path("/proc/cpuinfo")
AMX = CPUINFO.exists() and "amx_tile" in CPUINFO.read_text()
AVX512 = CPUINFO.exists() and "avx512f" in CPUINFO.read_text()
needs_amx = pytest.mark.skipif(not AMX, reason="vLLM's CPU kernels for integer experts need AMX")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="no .venv-vllm: run `make vllm-env` first"),
]

FAMILIES = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe"]
ALLOCATED = ["mixtral allocated", "qwen3_moe allocated"]  # layers differ in scheme
WITH_W8A8 = ["mixtral allocated W8A8", "qwen3_moe allocated W8A8"]
STACKED = ["mixtral rotated and smoothed", "qwen2_moe rotated and smoothed"]
SIGNED = ["mixtral signed", "mixtral allocated W8A8 signed"]  # scales of both signs
ROUNDS_INPUTS = [*WITH_W8A8, "mixtral allocated W8A8 signed"]
CASES = FAMILIES + ALLOCATED + WITH_W8A8 + STACKED + SIGNED


@pytest.mark.parametrize("family", FAMILIES + ALLOCATED + WITH_W8A8 + SIGNED)
def test_every_weight_is_stored_under_its_own_name(family, checkpoints):
    """4 bits leave an error near 0.1 of the weight; another tensor's weight is sqrt(2) away."""
    files = checkpoints[family]
    original, quantized, dequantized = (
        load_file(form / "model.safetensors")
        for form in (files.original, files.quantized, files.dequantized)
    )
    kept = [n for n in original.keys() & quantized.keys() if f"{n}_scale" not in quantized]
    assert kept
    assert all(torch.equal(original[name], quantized[name]) for name in kept)

    experts = [name for name in original if ".experts." in name]
    assert experts
    for name in experts:
        weight = original[name].float()
        assert (dequantized[name].float() - weight).norm() < 0.5 * weight.norm(), name


@pytest.mark.parametrize("case", STACKED)
def test_the_stacked_checkpoints_are_rotated_and_smoothed(case, checkpoints):
    files = checkpoints[case]
    original, quantized = (
        load_file(form / "model.safetensors") for form in (files.original, files.quantized)
    )
    changed = {n for n in original if n in quantized and not original[n].equal(quantized[n])}

    assert "model.embed_tokens.weight" in changed  # by the rotation
    norms = {name for name in original if "layernorm" in name}  # all ones, which rotating keeps
    assert norms & changed  # by AWQ


@pytest.mark.parametrize("case", ALLOCATED)
def test_the_allocated_layers_differ_in_group_size_and_in_being_quantized(case, checkpoints):
    tensors = load_file(checkpoints[case].quantized / "model.safetensors")
    of_layer = {}
    for name, tensor in tensors.items():
        if match := re.search(r"layers\.(\d+)\..*experts\.0\.(?:w2|down_proj)\.(\w+)$", name):
            of_layer.setdefault(match[1], {})[match[2]] = tuple(tensor.shape)

    scales = {of.get("weight_scale") for of in of_layer.values()}
    assert len(scales) == 3  # groups of 64, groups of 128, and none


@pytest.mark.parametrize("case", SIGNED)
def test_the_signed_checkpoints_have_scales_of_both_signs_in_every_linear(case, checkpoints):
    tensors = load_file(checkpoints[case].quantized / "model.safetensors")
    scales = {name: scale for name, scale in tensors.items() if name.endswith("weight_scale")}
    assert scales
    assert all((scale < 0).any() and (scale > 0).any() for scale in scales.values())


@pytest.mark.parametrize("case", WITH_W8A8)
def test_the_allocator_chose_int4_w8a8_and_16_bit_for_the_experts(case, checkpoints):
    files = checkpoints[case]
    config = json.loads((files.quantized / "config.json").read_text())["quantization_config"]
    formats = {group["format"] for group in config["config_groups"].values()}
    stored = expert_dtypes(files.quantized)

    assert (config["format"], formats) == ("mixed-precision", {"pack-quantized", "int-quantized"})
    assert set(stored.values()) == {torch.int32, torch.int8, torch.bfloat16}


@pytest.mark.parametrize("family", CASES)
def test_vllm_finds_every_tensor_in_the_checkpoint(family, exact):
    assert exact[family]["error"] is None


@pytest.mark.parametrize("family", CASES)
def test_every_expert_arrives_in_its_place_unchanged(family, exact, checkpoints):
    assert exact[family]["experts"] == stored_experts(checkpoints[family].quantized)


@pytest.mark.parametrize("family", CASES)
def test_vllm_computes_what_the_checkpoint_stands_for(family, exact, references):
    reference, weights = references[family]
    floor = mean_kl(weights, exact[f"{family} dequantized"]["logprobs"])
    rounded_inputs = mean_kl(reference, weights)  # 0 without W8A8

    assert (rounded_inputs > 1e3 * floor) == (family in ROUNDS_INPUTS)
    distances = kl(reference, exact[family]["logprobs"])
    assert distances.mean() <= 3 * floor + rounded_inputs / 10
    assert distances.quantile(0.25) <= 3 * floor


@needs_amx
@pytest.mark.parametrize("family", FAMILIES + WITH_W8A8)
def test_stock_kernels_add_no_more_than_8_bit_activations(family, stock, exact, references):
    """Small independent errors add in KL; three times allows for tokens that change experts."""
    reference, weights = references[family]
    floor = mean_kl(weights, stock[f"{family} dequantized"]["logprobs"])
    activations = mean_kl(reference, exact[f"{family} int8"]["logprobs"])

    assert stock[family]["error"] is None
    assert mean_kl(reference, stock[family]["logprobs"]) <= 3 * (floor + activations)


@pytest.mark.skipif(not AVX512, reason="vLLM's CPU kernel for dense int4 weights needs AVX512")
def test_the_stock_kernel_for_dense_weights_takes_negative_scales(prompts, tmp_path):
    """In bfloat16, as it is: what the same values cost as plain weights is the floor."""
    files = quantized_checkpoint("llama signed", tmp_path)
    jobs = [job("packed", files.quantized, "bfloat16"), job("plain", files.dequantized, "bfloat16")]
    results = run_probe(jobs, prompts, emulate=False)
    reference, _ = reference_logprobs(files, prompts)
    floor = mean_kl(reference, results["plain"]["logprobs"])

    assert results["packed"]["error"] is None
    assert mean_kl(reference, results["packed"]["logprobs"]) <= 3 * floor


@pytest.mark.parametrize(
    ("damage", "experts"),
    [
        ("swapped experts", {"1.0", "1.1"}),
        ("swapped W8A8 experts", {"3.0", "3.1"}),
        ("doubled scales", {"1.2"}),
        ("scales without their signs", {"1.2"}),
        ("missing expert", {"1.3"}),
    ],
)
def test_a_damaged_expert_is_noticed_and_named(damage, experts, exact, checkpoints, references):
    """vLLM loads all of them without a word, also strictly: it counts parameters, not experts."""
    case, _ = DAMAGES[damage]
    reference, weights = references[case]
    floor = mean_kl(weights, exact[f"{case} dequantized"]["logprobs"])
    sound = stored_experts(checkpoints[case].quantized).items()

    assert exact[damage]["error"] is None
    wrong = dict(sound ^ exact[damage]["experts"].items())
    assert {name.rsplit(".", 2)[0] for name in wrong} == experts
    assert mean_kl(reference, exact[damage]["logprobs"]) > 1e6 * floor


def test_vllm_refuses_a_layer_without_experts(exact):
    error = exact["missing layer"]["error"]

    assert "not initialized from checkpoint" in error
    assert "layers.1." in error


def stored_experts(checkpoint: Path) -> dict[str, str]:
    """Return ``layer.expert.projection.tensor`` and hash of all experts' tensors in the file."""
    kinds = "weight|weight_packed|weight_scale"
    name_of = re.compile(rf"layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.({kinds})$")
    hashes = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        if match := name_of.search(name):
            layer, expert, projection, kind = match.groups()
            projection = PROJECTIONS.get(projection, projection.removesuffix("_proj"))
            hashes[f"{layer}.{expert}.{projection}.{kind}"] = fingerprint(tensor)
    return hashes


def expert_dtypes(checkpoint: Path) -> dict[str, torch.dtype]:
    """Return the dtype of the experts' weights in the file, by layer, each of which has one."""
    dtypes = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        if match := re.search(r"layers\.(\d+)\..*experts\..*\.weight(_packed)?$", name):
            assert dtypes.setdefault(match[1], tensor.dtype) == tensor.dtype, name
    return dtypes


def mean_kl(reference: torch.Tensor, logprobs: list[list[list[float]]] | torch.Tensor) -> float:
    return kl(reference, logprobs).mean().item()


def kl(reference: torch.Tensor, logprobs: list[list[list[float]]] | torch.Tensor) -> torch.Tensor:
    """By position; normalized again in float64, as float32 sums to 1 only to 1e-7."""
    logprobs = torch.as_tensor(logprobs, dtype=torch.float64).log_softmax(-1)
    return (reference.exp() * (reference - logprobs)).sum(-1)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_ids(samples=4, length=32, seed=1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Iterator[dict[str, Checkpoint]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # GPTQ on matrices this small is many times slower on more
    yield {
        case: quantized_checkpoint(case, tmp_path_factory.mktemp(case.replace(" ", "_")))
        for case in CASES
    }
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def references(checkpoints, prompts) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What the checkpoint computes according to transformers, and what its weights alone do."""
    return {case: reference_logprobs(files, prompts) for case, files in checkpoints.items()}


@pytest.fixture(scope="module")
def exact(checkpoints, prompts, tmp_path_factory) -> dict[str, dict]:
    """Results of vLLM with its integer kernels replaced by exact products, by job."""
    jobs = []
    for family, files in checkpoints.items():
        jobs += [
            job(family, files.quantized, "float32"),
            job(f"{family} dequantized", files.dequantized, "float32"),
        ]
        if AMX:
            jobs.append(job(f"{family} int8", files.quantized, "bfloat16", int8_activations=True))
    for damage, (case, apply) in DAMAGES.items():
        broken = tmp_path_factory.mktemp("broken") / "checkpoint"
        write_damaged(checkpoints[case].quantized, broken, apply)
        jobs.append(job(damage, broken, "float32"))
    return run_probe(jobs, prompts, emulate=True)


@pytest.fixture(scope="module")
def stock(checkpoints, prompts) -> dict[str, dict]:
    """Results of vLLM as it is, by job; its integer kernels for experts take bfloat16 only."""
    jobs = []
    for family, files in checkpoints.items():
        jobs += [
            job(family, files.quantized, "bfloat16"),
            job(f"{family} dequantized", files.dequantized, "bfloat16"),
        ]
    return run_probe(jobs, prompts, emulate=False)


def job(name: str, path: Path, dtype: str, int8_activations: bool = False) -> dict:
    return {
        "name": name,
        "path": str(path),
        "dtype": dtype,
        "int8_activations": int8_activations,
    }


def run_probe(jobs: list[dict], prompts: list[list[int]], emulate: bool) -> dict[str, dict]:
    process = subprocess.run(
        [VLLM_PYTHON, Path(__file__).with_name("vllm_probe.py")],
        input=json.dumps({"emulate": emulate, "prompts": prompts, "jobs": jobs}),
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # read when the process starts
    )
    if process.returncode:
        pytest.fail(f"the probe ended with {process.returncode}:\n{process.stderr[-5000:]}")
    return json.loads(process.stdout)["jobs"]


def write_damaged(checkpoint: Path, target: Path, damage: Callable[[dict], None]) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    damage(tensors)
    shutil.copytree(checkpoint, target)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def of_expert(tensors: dict[str, torch.Tensor], expert: int | str, layer: int = 1) -> list[str]:
    """Return the names of one expert's tensors in a layer."""
    return [n for n in tensors if re.search(rf"layers\.{layer}\..*\.experts\.{expert}\.", n)]


def swap_experts(tensors: dict[str, torch.Tensor], layer: int = 1) -> None:
    for name in of_expert(tensors, 0, layer):
        other = name.replace(".experts.0.", ".experts.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def double_scales(tensors: dict[str, torch.Tensor]) -> None:
    for name in of_expert(tensors, 2):
        if name.endswith("weight_scale"):
            tensors[name] *= 2


def drop_signs(tensors: dict[str, torch.Tensor]) -> None:
    for name in of_expert(tensors, 2):
        if name.endswith("weight_scale"):
            tensors[name] = tensors[name].abs()


def drop_expert(tensors: dict[str, torch.Tensor]) -> None:
    for name in of_expert(tensors, 3):
        del tensors[name]


def drop_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in of_expert(tensors, r"\d+"):
        del tensors[name]


# To which checkpoint it is done, and what.
DAMAGES = {
    "swapped experts": ("mixtral", swap_experts),
    "swapped W8A8 experts": ("mixtral allocated W8A8", partial(swap_experts, layer=3)),
    "doubled scales": ("mixtral", double_scales),
    "scales without their signs": ("mixtral signed", drop_signs),
    "missing expert": ("mixtral", drop_expert),
    "missing layer": ("mixtral", drop_layer),
}
