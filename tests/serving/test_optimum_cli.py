"""``optimum-cli moeq`` in an environment with Optimum and GPTQModel (`make gptq-env`)."""

import json
import os
import subprocess

import pytest
import torch
from helpers import tokens
from safetensors.torch import load_file
from test_gptq_readers import GPTQMODEL, needs_gptqmodel, write_original

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "LLM_COMPRESSOR_LOG_LEVEL": "INFO",  # tests turn it down, users do not
}
pytestmark = [pytest.mark.slow, *needs_gptqmodel]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cli")
    write_original("qwen3_moe", directory / "model")
    rows = tokens(8, 32).tolist()
    lines = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
    (directory / "data.jsonl").write_text(lines)
    return directory


def optimum_cli(*arguments):
    return subprocess.run(
        [GPTQMODEL.with_name("optimum-cli"), *map(str, arguments)],
        capture_output=True, text=True, timeout=900, check=False,
        env=os.environ | ENVIRONMENT,
    )  # fmt: skip


def test_it_writes_what_our_own_quantizer_writes(model):
    """Another transformers computes the activations, so a code in a hundred may round elsewhere."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM

    from moeq_plugin.integrations.hf.gptq.quantizer import MoEGPTQQuantizer

    settings = ["--bits", 4, "--group-size", 32, "--dataset", model / "data.jsonl"]
    done = optimum_cli("moeq", model / "model", model / "cli", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "100.00 % of block parameters quantized" in done.stderr + done.stdout

    data = load_dataset("json", data_files=str(model / "data.jsonl"), split="train")
    quantizer = MoEGPTQQuantizer(bits=4, group_size=32, dataset=data)
    ours = AutoModelForCausalLM.from_pretrained(model / "model", dtype=torch.float16)
    quantizer.save(quantizer.quantize_model(ours), model / "ours")

    found, expected = (load_file(model / d / "model.safetensors") for d in ("cli", "ours"))
    assert found.keys() == expected.keys()
    pairs = [(found[n], expected[n]) for n in expected if n.endswith("qweight")]
    different = sum(int((_codes(a) != _codes(b)).sum()) for a, b in pairs)
    assert different <= 0.01 * sum(len(_codes(b)) for _, b in pairs)
    sections = [
        json.loads((model / d / "quantize_config.json").read_text()) for d in ("cli", "ours")
    ]
    assert sections[0] == sections[1]


def test_its_help_names_the_command():
    assert "moeq" in optimum_cli("--help").stdout


def _codes(words: torch.Tensor) -> torch.Tensor:
    from moeq_plugin.core.gptq_format import unpack

    return unpack(words, 4).flatten()
