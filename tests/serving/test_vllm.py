"""Checkpoints load in real vLLM, every expert in its place, and compute what was quantized.

vLLM lives in an environment of its own (`make vllm-env`): it pins another compressed-tensors than
llm-compressor needs. One process there (``vllm_probe.py``) loads all checkpoints one after another
and returns hashes of the expert buffers and log-probabilities; everything is judged here.

How far may vLLM be from transformers? Both are given the same values in 16 bit (the *dequantized*
checkpoint) and the mean KL divergence between them is the *floor*: two programs, one model. The
quantized checkpoint holds the same values, so it may not be further than three times the floor.
Where vLLM's int4 kernels are replaced by exact products all of this is in float32 and the floor is
rounding noise, about 1e-13. The stock kernels compute in bfloat16 and round activations to 8 bits:
what that costs is measured by rounding the inputs of the replaced kernels alike, and added.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_probe import fingerprint

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
CPUINFO = Path("/proc/cpuinfo")
AMX = CPUINFO.exists() and "amx_tile" in CPUINFO.read_text()
needs_amx = pytest.mark.skipif(not AMX, reason="vLLM's CPU int4 MoE kernels need AMX")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="no .venv-vllm: run `make vllm-env` first"),
]

FAMILIES = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe"]
ALLOCATED = ["mixtral allocated", "qwen3_moe allocated"]  # layers differ in scheme
CASES = FAMILIES + ALLOCATED
TO_BREAK = "mixtral"  # this family's checkpoint is also damaged on purpose
VOCABULARY = 512
PROJECTIONS = {"w1": "gate", "w3": "up", "w2": "down"}  # Mixtral's names for them


@dataclass(frozen=True)
class Checkpoint:
    """One tiny model in its three forms on disk."""

    original: Path  # 16 bit
    quantized: Path  # as our users hand it to vLLM
    dequantized: Path  # 16 bit again, with the values that the quantized one stands for


@pytest.mark.parametrize("family", CASES)
def test_every_weight_is_stored_under_its_own_name(family, checkpoints):
    """4 bits leave an error near 0.1 of the weight; another tensor's weight is sqrt(2) away."""
    original, dequantized = (
        load_file(form / "model.safetensors")
        for form in (checkpoints[family].original, checkpoints[family].dequantized)
    )
    experts = [name for name in original if ".experts." in name]

    assert experts
    for name in experts:
        weight = original[name].float()
        assert (dequantized[name].float() - weight).norm() < 0.5 * weight.norm(), name


@pytest.mark.parametrize("case", ALLOCATED)
def test_the_allocated_layers_differ_in_group_size_and_in_being_quantized(case, checkpoints):
    tensors = load_file(checkpoints[case].quantized / "model.safetensors")
    of_layer = {}
    for name, tensor in tensors.items():
        if match := re.search(r"layers\.(\d+)\..*experts\.0\.(?:w2|down_proj)\.(\w+)$", name):
            of_layer.setdefault(match[1], {})[match[2]] = tuple(tensor.shape)

    scales = {of.get("weight_scale") for of in of_layer.values()}
    assert len(scales) == 3  # groups of 64, groups of 128, and none


@pytest.mark.parametrize("family", CASES)
def test_vllm_finds_every_tensor_in_the_checkpoint(family, exact):
    assert exact[family]["error"] is None


@pytest.mark.parametrize("family", CASES)
def test_every_expert_arrives_in_its_place_unchanged(family, exact, checkpoints):
    assert exact[family]["experts"] == stored_experts(checkpoints[family].quantized)


@pytest.mark.parametrize("family", CASES)
def test_vllm_computes_what_the_quantized_weights_stand_for(family, exact, references):
    reference = references[family]
    floor = mean_kl(reference, exact[f"{family} dequantized"])

    assert mean_kl(reference, exact[family]) <= 3 * floor


@needs_amx
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_int4_kernels_add_no_more_than_8_bit_activations(family, stock, exact, references):
    """Small independent errors add in KL; three times allows for tokens that change experts."""
    reference = references[family]
    floor = mean_kl(reference, stock[f"{family} dequantized"])
    activations = mean_kl(reference, exact[f"{family} int8"])

    assert stock[family]["error"] is None
    assert mean_kl(reference, stock[family]) <= 3 * (floor + activations)


@pytest.mark.parametrize(
    ("damage", "experts"),
    [
        ("swapped experts", {"1.0", "1.1"}),
        ("doubled scales", {"1.2"}),
        ("missing expert", {"1.3"}),
    ],
)
def test_a_damaged_expert_is_noticed_and_named(damage, experts, exact, checkpoints, references):
    """vLLM loads all three without a word, also strictly: it counts parameters, not experts."""
    reference = references[TO_BREAK]
    floor = mean_kl(reference, exact[f"{TO_BREAK} dequantized"])
    sound = stored_experts(checkpoints[TO_BREAK].quantized).items()

    assert exact[damage]["error"] is None
    wrong = dict(sound ^ exact[damage]["experts"].items())
    assert {name.rsplit(".", 2)[0] for name in wrong} == experts
    assert mean_kl(reference, exact[damage]) > 1e6 * floor


def test_vllm_refuses_a_layer_without_experts(exact):
    error = exact["missing layer"]["error"]

    assert "not initialized from checkpoint" in error
    assert "layers.1." in error


def stored_experts(checkpoint: Path) -> dict[str, str]:
    """Return ``layer.expert.projection.tensor`` and hash of all experts' tensors in the file."""
    name_of = re.compile(r"layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.(weight_packed|weight_scale)")
    hashes = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        if match := name_of.search(name):
            layer, expert, projection, kind = match.groups()
            projection = PROJECTIONS.get(projection, projection.removesuffix("_proj"))
            hashes[f"{layer}.{expert}.{projection}.{kind}"] = fingerprint(tensor)
    return hashes


def mean_kl(reference: torch.Tensor, result: dict) -> float:
    """Mean over positions; normalized again in float64, as float32 sums to 1 only to 1e-7."""
    logprobs = torch.tensor(result["logprobs"], dtype=torch.float64).log_softmax(-1)
    return (reference.exp() * (reference - logprobs)).sum(-1).mean().item()


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
def references(checkpoints, prompts) -> dict[str, torch.Tensor]:
    """What transformers computes in float32 from the dequantized weights."""
    from transformers import AutoModelForCausalLM

    logprobs = {}
    for family, files in checkpoints.items():
        model, report = AutoModelForCausalLM.from_pretrained(
            files.dequantized, dtype=torch.float32, output_loading_info=True
        )
        assert not any(report.values()), report  # transformers only warns, and fills in noise
        with torch.no_grad():
            logits = model(torch.tensor(prompts)).logits[:, :-1]
        logprobs[family] = logits.double().log_softmax(-1)
    return logprobs


@pytest.fixture(scope="module")
def exact(checkpoints, prompts, tmp_path_factory) -> dict[str, dict]:
    """Results of vLLM with its int4 kernels replaced by exact products, by job."""
    jobs = []
    for family, files in checkpoints.items():
        jobs += [
            job(family, files.quantized, "float32"),
            job(f"{family} dequantized", files.dequantized, "float32"),
        ]
        if AMX:
            jobs.append(job(f"{family} int8", files.quantized, "bfloat16", int8_activations=True))
    for damage, apply in DAMAGES.items():
        broken = tmp_path_factory.mktemp("broken") / "checkpoint"
        write_damaged(checkpoints[TO_BREAK].quantized, broken, apply)
        jobs.append(job(damage, broken, "float32"))
    return run_probe(jobs, prompts, emulate=True)


@pytest.fixture(scope="module")
def stock(checkpoints, prompts) -> dict[str, dict]:
    """Results of vLLM as it is, by job; its int4 kernels for experts take bfloat16 only."""
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


def of_expert(tensors: dict[str, torch.Tensor], expert: int | str) -> list[str]:
    """Return the names of one expert's tensors in layer 1."""
    return [n for n in tensors if re.search(rf"layers\.1\..*\.experts\.{expert}\.", n)]


def swap_experts(tensors: dict[str, torch.Tensor]) -> None:
    for name in of_expert(tensors, 0):
        other = name.replace(".experts.0.", ".experts.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def double_scales(tensors: dict[str, torch.Tensor]) -> None:
    for name in of_expert(tensors, 2):
        if name.endswith("weight_scale"):
            tensors[name] *= 2


def drop_expert(tensors: dict[str, torch.Tensor]) -> None:
    for name in of_expert(tensors, 3):
        del tensors[name]


def drop_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in of_expert(tensors, r"\d+"):
        del tensors[name]


DAMAGES = {
    "swapped experts": swap_experts,
    "doubled scales": double_scales,
    "missing expert": drop_expert,
    "missing layer": drop_layer,
}


def quantized_checkpoint(case: str, tmp_path: Path) -> Checkpoint:
    """Write a random model, quantized to W4A16 with groups of 128 or, allocated, to a mix."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    from moeq_plugin import MoEQuantModifier as Modifier

    family = case.split()[0]
    wish = {"scheme": "W4A16"}
    if case in ALLOCATED:  # what vLLM's kernels for CPUs know
        options = ["W4A16", "W4A16_G64", "UNQUANTIZED"]
        ignore = ["re:.*self_attn.*", "lm_head"]  # one layer in 16 bit, the others of both groups
        wish = {"bits_per_weight": 7.15, "options": options, "ignore": ignore}
    files = Checkpoint(*(tmp_path / form for form in ("original", "quantized", "dequantized")))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.bfloat16)
    tokenizer = tiny_tokenizer()
    for saved in (model, tokenizer):
        saved.save_pretrained(files.original)
    model = AutoModelForCausalLM.from_pretrained(files.original, dtype=torch.bfloat16)
    ids = random_ids(samples=8, length=64, seed=0)
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 64] * 8}),
        recipe=Modifier(**wish),
        num_calibration_samples=8,
        max_seq_length=64,
    )
    for saved in (model, tokenizer):
        saved.save_pretrained(files.quantized)
    write_dequantized(files)
    return files


def tiny_config(family: str):
    """Four layers of four or eight experts; every dimension is a multiple of the group, 128."""
    from transformers import AutoConfig

    experts = {"num_experts": 8, "moe_intermediate_size": 128, "intermediate_size": 256}
    own = {
        "mixtral": {"num_local_experts": 4, "intermediate_size": 256},
        "qwen3_moe": experts | {"head_dim": 64},
        "qwen2_moe": experts | {"shared_expert_intermediate_size": 256},
        "olmoe": {"num_experts": 8, "intermediate_size": 128, "eos_token_id": 0},
    }
    return AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.05,
        **own[family],
    )


def tiny_tokenizer():
    """One token per number: llm-compressor wants a tokenizer beside the data."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0")


def random_ids(samples: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (samples, length), generator=generator).tolist()


def write_dequantized(files: Checkpoint) -> None:
    """Write the original with every quantized weight replaced by the value it is decoded to."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    quantized = load_file(files.quantized / "model.safetensors")
    tensors = load_file(files.original / "model.safetensors")
    for name in tensors:
        stem = name.removesuffix(".weight")
        for mixtral, common in PROJECTIONS.items():
            if f"{stem}.weight_packed" not in quantized:  # stock llm-compressor renames Mixtral's
                stem = re.sub(rf"{mixtral}$", f"{common}_proj", stem)
        if f"{stem}.weight_packed" not in quantized:
            assert torch.equal(tensors[name], quantized[name])
            continue
        scale = quantized[f"{stem}.weight_scale"]
        codes = unpack_from_int32(quantized[f"{stem}.weight_packed"], 4, tensors[name].shape)
        group = codes.shape[1] // scale.shape[1]
        tensors[name] = codes.to(scale.dtype) * scale.repeat_interleave(group, dim=1)
    shutil.copytree(files.original, files.dequantized)
    save_file(tensors, files.dequantized / "model.safetensors", {"format": "pt"})
