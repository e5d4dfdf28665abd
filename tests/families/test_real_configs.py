"""Published models by the facts of their ``config.json``: sizes as published, nothing unknown.

Weights are not there. A file has the header that transformers would write for the config, and no
data behind it.
"""

import json
import math
import struct
from pathlib import Path

import pytest

pytest.importorskip("llmcompressor")

import torch
from examination import command
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from moeq_plugin.checkpoint.overview import inspect_model
from moeq_plugin.cli.built import build

# billions of parameters as published; `active` sometimes leaves out the token embedding
PUBLISHED = json.loads(Path(__file__).with_name("real_configs.json").read_text())
NO_FACTS = ("total", "active")
QUICK = ("allenai/OLMoE-1B-7B-0924", "Qwen/Qwen1.5-MoE-A2.7B", "databricks/dbrx-instruct")


def write_headers(config, directory):
    """Write a config and a file that is as long as its header says, with nothing in it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    tied = set(model.all_tied_weights_keys)
    state = {name: t for name, t in model.state_dict().items() if name not in tied}
    entries, end = {}, 0
    for name, tensor in sorted(revert_weight_conversion(model, state).items()):
        begin, end = end, end + 2 * math.prod(tensor.shape)
        entries[name] = {
            "dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]
        }  # fmt: skip
    header = json.dumps(entries).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)  # a hole in the file, which takes no room


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PUBLISHED]
)
def test_a_published_model_has_the_published_size(name, tmp_path):
    facts = PUBLISHED[name]
    config = {key: value for key, value in facts.items() if key not in NO_FACTS}
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    write_headers(config, tmp_path)
    found = inspect_model(tmp_path, build)
    assert found.refusal == ""
    assert found.family == config.model_type
    assert found.num_parameters == pytest.approx(facts["total"] * 1e9, rel=0.01)
    embedding = config.vocab_size * config.hidden_size
    both = (found.num_active, found.num_active - embedding)
    assert any(active == pytest.approx(facts["active"] * 1e9, rel=0.08) for active in both), both
    code, said = command("plan", tmp_path, "--scheme", "W4A16_G64")
    assert code == 0, said
    assert "refused" not in said
