"""Our model of vLLM's scheme lookup gives the answers of vLLM itself."""

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest

from moeq_plugin.checkpoint.architecture import KEPT, Role
from moeq_plugin.checkpoint.config import Config
from moeq_plugin.checkpoint.families import FAMILIES, architecture_of
from moeq_plugin.checkpoint.lookup import ConflictError, Lookup
from moeq_plugin.checkpoint.read_schemes import read_schemes
from moeq_plugin.checkpoint.reader_names import fused_name, in_vllm
from moeq_plugin.core.names import FUSED

ROOT = Path(__file__).parents[2]
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="no .venv-vllm: run `make vllm-env` first"),
]

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_experts": 2, "num_experts_per_tok": 1,
    "shared_expert_intermediate_size": 64, "n_shared_experts": 1, "kv_lora_rank": 16,
    "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip


def group(bits, *targets):
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 16}
    return {"targets": list(targets), "weights": weights | {"symmetric": True}}


# name -> (groups, ignore)
CONFIGS = {
    "one scheme": ([group(4, "Linear")], ["lm_head", "re:.*gate$"]),
    "nothing ignored": ([group(4, "Linear")], []),
    "layers by pattern": (
        [group(4, r"re:.*layers\.0\..*"), group(8, r"re:.*layers\.1\.(mlp|block_sparse_moe)\..*")],
        [],
    ),
    "one spelling": ([group(4, "Linear"), group(8, r"re:.*layers\.1\.mlp\.experts.*")], []),
    "projections": (
        [group(4, "re:.*(up|down)_proj$", "re:.*w[123]$"), group(8, "re:.*gate_proj$")], [],
    ),
    "expert 0": ([group(4, "Linear"), group(8, r"re:.*experts\.0\..*")], []),
    "attention by part": ([group(4, "re:.*q_proj", "re:.*k_proj", "re:.*v_proj")], []),
    "attention in part": ([group(4, "re:.*q_proj", "re:.*k_proj")], []),
    "first pattern wins": ([group(4, "re:.*self_attn.*"), group(8, "re:.*q_proj", "Linear")], []),
    "a part ignored": ([group(4, "Linear")], ["model.layers.0.self_attn.k_proj"]),
    "parts ignored": (
        [group(4, "Linear")], [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"],
    ),
    "an expert's block ignored": ([group(4, "Linear")], [r"re:.*layers\.0\.mlp\.experts.*"]),
}  # fmt: skip


def questions(family):
    """Yield our linear, and the names under which vLLM looks for its scheme."""
    for linear in architecture_of(Config({"model_type": family, **SIZES})).linears.values():
        name = in_vllm(linear.name, family)
        if linear.role is Role.EXPERT:
            block = linear.name.split(".experts.")[0]
            yield (
                linear,
                [
                    [in_vllm(f"{block}.experts.0.{p}_proj", family), "RoutedExperts"]
                    for p in ("gate", "up", "down")
                ],
            )
        elif linear.role is Role.HEAD:
            yield linear, [[name, "ParallelLMHead"]]
        elif linear.role not in KEPT or (linear.role is Role.ROUTER and family == "qwen3_moe"):
            yield linear, [[fused_name(name) or name, "ColumnParallelLinear"]]


@pytest.fixture(scope="module")
def cases():
    return [
        (family, name, quantization, list(questions(family)))
        for family in FAMILIES
        if family != "gpt_oss"  # renames what is in `ignore` with a mapper of its own
        for name, (groups, ignore) in CONFIGS.items()
        for quantization in [
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {f"group_{i}": g for i, g in enumerate(groups)},
                "ignore": ignore,
            }
        ]
    ]


@pytest.fixture(scope="module")
def answers(cases, tmp_path_factory):
    file = tmp_path_factory.mktemp("lookup") / "jobs.json"
    jobs = [
        {
            "config": copy.deepcopy(quantization),
            "fused": {whole: list(parts) for whole, parts in FUSED.items()},
            "modules": [module for _, modules in asked for module in modules],
        }
        for _, _, quantization, asked in cases
    ]
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [VLLM_PYTHON, Path(__file__).with_name("lookup_probe.py"), file],
        capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    return json.loads(line.removeprefix("ANSWERS "))


def test_every_lookup_is_vllms_own(cases, answers):
    num_compared = 0
    for (family, name, quantization, asked), answer in zip(cases, answers, strict=True):
        schemes = read_schemes({"quantization_config": quantization})
        lookup, rest = Lookup(schemes, family), list(answer)
        for linear, modules in asked:
            theirs, rest = rest[: len(modules)], rest[len(modules) :]
            alike = all(one == theirs[0] for one in theirs)
            expected = theirs[0] if alike else "conflict"
            try:
                scheme = lookup.in_vllm(linear)
                ours = scheme and [scheme.num_bits, scheme.group_size, scheme.symmetric]
            except ConflictError:
                ours = "conflict"
            assert ours == expected, (family, name, linear.name, modules)
            num_compared += 1
        assert not rest
    assert num_compared > 1000
