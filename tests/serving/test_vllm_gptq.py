"""vLLM loads a converted checkpoint to the same numbers as the one it was converted from."""

import json
import shutil

import pytest
import torch
from test_vllm import VLLM_PYTHON, job, run_probe
from vllm_checkpoints import quantized_checkpoint, random_ids

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="no .venv-vllm: run `make vllm-env` first"),
]
FAMILIES = ["mixtral", "qwen3_moe", "mixtral signed"]


@pytest.mark.parametrize("family", FAMILIES)
def test_both_formats_give_the_same_log_probabilities(family, results):
    packed, converted = results[family], results[f"{family} gptq"]
    assert (packed["error"], converted["error"]) == (None, None)
    assert torch.equal(torch.tensor(packed["logprobs"]), torch.tensor(converted["logprobs"]))


def test_vllm_says_which_width_it_does_not_know(results):
    assert "Unsupported quantization config: bits=3, sym=True" in results["3 bits"]["error"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    from moeq_plugin.integrations.hf.gptq.convert import convert

    jobs = []
    for family in FAMILIES:
        root = tmp_path_factory.mktemp(family.replace(" ", "_"))
        packed = quantized_checkpoint(family, root).quantized
        convert(packed, root / "gptq", "gptq")
        # vLLM refuses float32 for this format. Its GPTQ experts have optional biases, which a
        # strict loader would miss.
        jobs.append(job(family, packed, "bfloat16"))
        jobs.append(job(f"{family} gptq", root / "gptq", "bfloat16") | {"strict": False})
    jobs.append(job("3 bits", with_bits(root / "gptq", root / "other", 3), "bfloat16"))
    return run_probe(jobs, random_ids(samples=4, length=32, seed=1), emulate=True)


def with_bits(source, target, bits):
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["bits"] = bits
    (target / "config.json").write_text(json.dumps(config))
    return target
