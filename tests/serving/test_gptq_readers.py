"""Programs of others read our GPTQ-format checkpoints: the same weights, and the same logits.

They need a transformers that llm-compressor does not work with, so each lives in an environment of
its own: GPTQModel and Optimum (`make gptq-env`), AutoGPTQ (`make autogptq-env`), vLLM
(`make vllm-env`). ``gptq_probe.py`` runs there; everything is judged here.

A reader's weights must equal ours bit for bit: both are ``scale * (code - zero)`` in float16. Its
logits may differ by what the order of sums does in float16: at most 1 % of the largest logit,
twenty steps of float16; a wrong expert changes logits by as much as they are.
"""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from gptq_probe import fingerprint
from helpers import FAMILIES, dataset, int4, oneshot, tiny_model, tokens
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
GPTQMODEL = ROOT / ".venv-gptq" / "bin" / "python"
AUTOGPTQ = ROOT / ".venv-autogptq" / "bin" / "python"
pytestmark = pytest.mark.slow
needs_gptqmodel = [
    pytest.mark.gptq,
    pytest.mark.skipif(not GPTQMODEL.exists(), reason="no .venv-gptq: run `make gptq-env` first"),
]
needs_autogptq = [
    pytest.mark.autogptq,
    pytest.mark.skipif(
        not AUTOGPTQ.exists(), reason="no .venv-autogptq: run `make autogptq-env` first"
    ),
]


@dataclass(frozen=True)
class Case:
    """A model and how it is quantized; readers know different parts of the format."""

    family: str
    settings: dict

    def __str__(self):
        return " ".join([self.family, *(f"{key}={value}" for key, value in self.settings.items())])


FOR_GPTQMODEL = [
    Case("qwen3_moe", {"bits": 4, "group_size": 32}),
    Case("mixtral", {"bits": 4, "group_size": 32, "names": "modules"}),
    Case("olmoe", {"bits": 3, "group_size": 32}),
    Case("deepseek_v2", {"bits": 8, "group_size": 32}),
    Case("qwen2_moe", {"bits": 4, "group_size": 32, "sym": False}),
    Case("qwen3_moe", {"bits": 2, "group_size": 32, "format": "gptq_v2"}),
    Case("llama", {"bits": 4, "group_size": -1}),
    *(Case("qwen3_moe", {"bits": b, "group_size": 32, "signed": True}) for b in (2, 3, 4, 8)),
]
FOR_TRANSFORMERS = [Case("llama", {"bits": 4, "group_size": 32})]
FOR_AUTOGPTQ = [
    Case("mixtral", {"bits": 4, "group_size": 32}),
    Case("mixtral", {"bits": 4, "group_size": 32, "sym": False, "format": "gptq"}),
    Case("mixtral", {"bits": 3, "group_size": 32}),
    Case("llama", {"bits": 4, "group_size": 32}),
    Case("llama", {"bits": 2, "group_size": 32}),
    Case("llama", {"bits": 8, "group_size": -1}),
    Case("mixtral", {"bits": 4, "group_size": 32, "signed": True}),
]
READERS = {
    "gptqmodel": (GPTQMODEL, FOR_GPTQMODEL, needs_gptqmodel),
    "transformers": (GPTQMODEL, FOR_TRANSFORMERS, needs_gptqmodel),
    "auto_gptq": (AUTOGPTQ, FOR_AUTOGPTQ, needs_autogptq),
}
PAIRS = [
    pytest.param(reader, case, marks=marks, id=f"{reader} {case}")
    for reader, (_, cases, marks) in READERS.items()
    for case in cases
]


@pytest.mark.parametrize(("reader", "case"), PAIRS)
def test_every_weight_arrives_bit_by_bit(reader, case, results, references):
    result, reference = results(reader)[str(case)], references(case)
    assert result["error"] is None
    assert result["quantized"] == len(reference["weights"])
    assert result["weights"] == reference["weights"]


@pytest.mark.parametrize(("reader", "case"), PAIRS)
def test_logits_match_ours(reader, case, results, references):
    logits = torch.tensor(results(reader)[str(case)]["logits"])
    expected = references(case)["logits"]
    assert (logits - expected).abs().max() <= 0.01 * expected.abs().max()


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Return a function from a case to its directory, weights and logits."""
    known = {}

    def reference(case):
        if str(case) not in known:
            known[str(case)] = quantized(case, tmp_path_factory.mktemp("gptq"))
        return known[str(case)]

    return reference


@pytest.fixture(scope="module")
def results(references):
    """Return a function from a reader to what it read of all its cases, in one process."""
    known = {}

    def result(reader):
        if reader not in known:
            python, cases, _ = READERS[reader]
            jobs = {str(case): str(references(case)["path"]) for case in cases}
            known[reader] = run_probe(python, reader, jobs)
        return known[reader]

    return result


def run_probe(python: Path, reader: str, jobs: dict[str, str]) -> dict[str, dict]:
    request = {"reader": reader, "prompts": prompts().tolist(), "jobs": jobs}
    process = subprocess.run(
        [python, Path(__file__).with_name("gptq_probe.py")],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=1800,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    if process.returncode:
        pytest.fail(f"the probe ended with {process.returncode}:\n{process.stderr[-5000:]}")
    return json.loads(process.stdout)["jobs"]


def quantized(case: Case, directory: Path) -> dict:
    """Quantize a random model in float16, save it in GPTQ format, remember what it was."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moeq_plugin.integrations.hf.gptq.names import Names, renamer

    write_original(case.family, directory / "original")
    model = AutoModelForCausalLM.from_pretrained(directory / "original", dtype=torch.float16)
    save = quantize_signed if case.settings.get("signed") else quantize_as_optimum
    save = save(case, model)
    rename = renamer(case.family, Names(case.settings.get("names", "checkpoint")))
    weights = {
        rename(f"{name}.weight").removesuffix(".weight"): fingerprint(module.weight)
        for name, module in model.named_modules()
        if hasattr(module, "quantization_scheme")
    }
    with torch.no_grad():
        logits = model(prompts()).logits.float()
    save(directory / "gptq")
    AutoTokenizer.from_pretrained(directory / "original").save_pretrained(directory / "gptq")
    return {"path": directory / "gptq", "weights": weights, "logits": logits}


def quantize_as_optimum(case: Case, model: torch.nn.Module) -> Callable[[Path], None]:
    """Quantize through Optimum's interface; return what saves the model."""
    from moeq_plugin.integrations.hf.gptq.quantizer import MoEGPTQQuantizer

    quantizer = MoEGPTQQuantizer(**case.settings, dataset=dataset())
    quantizer.quantize_model(model)
    return partial(quantizer.save, model)


def quantize_signed(case: Case, model: torch.nn.Module) -> Callable[[Path], None]:
    """Quantize to scales of both signs; return what saves the model and converts it."""
    from moeq_plugin import MoEQuantModifier
    from moeq_plugin.integrations.hf.gptq.convert import convert

    groups = int4(case.settings["group_size"], num_bits=case.settings["bits"])
    search = {"scale_search": "narrow", "signed_scales": True, "ignore": ["lm_head"]}
    oneshot(model, MoEQuantModifier(config_groups=groups, **search))

    def save(directory: Path) -> None:
        packed = directory.with_name("packed")
        model.save_pretrained(packed)
        tensors = load_file(packed / "model.safetensors")
        assert any((t < 0).any() for name, t in tensors.items() if name.endswith("_scale"))
        convert(packed, directory, "gptq")

    return save


def write_original(family: str, directory: Path) -> None:
    """Write a tiny model in float16, and a tokenizer, which GPTQModel insists on."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    if family in FAMILIES:
        changes = {"kv_lora_rank": 32} if family == "deepseek_v2" else {}
        model = tiny_model(family, directory, **changes)
    else:
        torch.manual_seed(0)
        shape = {key: FAMILIES["mixtral"][key] for key in DENSE}
        config = AutoConfig.for_model(family, **shape)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(torch.float16).save_pretrained(directory)
    words = models.WordLevel({str(i): i for i in range(128)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="0")
    tokenizer.save_pretrained(directory)


DENSE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
    "tie_word_embeddings",
)  # fmt: skip


def prompts() -> torch.Tensor:
    return tokens(2, 16, seed=5)
