"""The stacking matrix: what comes before MoEQuantModifier in a recipe, and what schemes it takes.

Each cell is saved, reloaded and compared with the model in memory, or refused with the reason.
"""

import json

import pytest
import torch
from helpers import FAMILIES, change, dataset, int4, logits, oneshot, tiny_model, uneven_model

pytest.importorskip("llmcompressor")

from compressed_tensors.quantization import disable_quantization
from llmcompressor.modifiers.pruning import REAPPruningModifier
from llmcompressor.modifiers.transform import QuIPModifier, SmoothQuantModifier, SpinQuantModifier
from loguru import logger
from transformers import AutoModelForCausalLM

from moeq_plugin import MoEQuantAWQModifier, MoEQuantModifier
from moeq_plugin.integrations.llm_compressor import ResidualRotationModifier
from moeq_plugin.integrations.llm_compressor.checkpoint.loading import load_dequantized
from moeq_plugin.models.moe import find_moe_layers

ATTENTION = [
    [["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"], "re:.*input_layernorm$"],
]  # fmt: skip
FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
BEFORE = {
    "rotation": lambda family: [ResidualRotationModifier()],
    "reap": lambda family: [REAPPruningModifier(sparsity=0.5)],
    "smoothquant": lambda family: [smoothquant(family)],
    "all": lambda family: [
        ResidualRotationModifier(), REAPPruningModifier(sparsity=0.5), smoothquant(family),
    ],
}  # fmt: skip
# arguments, and how near a checkpoint comes to the model in memory with activations in 16 bit:
# of the median token, for NVFP4 is decompressed in bfloat16 and an expert is then chosen
# differently now and then
SCHEMES = {
    "int4": ({"config_groups": int4(16)}, 1e-5),
    "int4-fp8-cache": ({"config_groups": int4(16), "kv_cache_scheme": FP8_CACHE}, 1e-5),
    "W8A8": ({"scheme": "W8A8"}, 1e-5),
    "FP8": ({"scheme": "FP8"}, 1e-5),
    "FP8_DYNAMIC": ({"scheme": "FP8_DYNAMIC"}, 1e-5),
    "W4AFP8": ({"scheme": "W4AFP8"}, 1e-5),
    "NVFP4": ({"scheme": "NVFP4"}, 0.05),
    "NVFP4A16": ({"scheme": "NVFP4A16"}, 0.05),
}
WEIGHTS_ONLY = {"int4", "int4-fp8-cache"}  # and those that plain transformers reads exactly
MISREAD = {  # and what is said of them
    "W8A8": "only if they are packed",
    "W4AFP8": "only if they are packed",
    "NVFP4": "the second scale",
    "NVFP4A16": "the second scale",
}


def smoothquant(family):
    # the host's own mappings for these two miss the router
    return SmoothQuantModifier(mappings=ATTENTION if family in {"olmoe", "gpt_oss"} else None)


def source(family, directory, **changes):
    if family.startswith("deepseek"):  # the first layer is dense
        changes["n_routed_experts"] = 8  # two groups, and two experts have to stay in each
    else:
        changes["num_hidden_layers"] = 1
    return uneven_model(family, directory, **changes)


def change_of_median_token(after, before):
    """Return how much logits changed, without the few tokens whose experts are chosen anew."""
    return ((after - before).norm(dim=-1) / before.norm(dim=-1)).median().item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("before", BEFORE)
def test_what_comes_before(family, before, tmp_path):
    """What is quantized is what it left, and the checkpoint is the model in memory."""
    alone, stacked = (source(family, tmp_path / "source") for _ in range(2))
    oneshot(alone, BEFORE[before](family))
    modifier = MoEQuantModifier(config_groups=int4(16, num_bits=8))
    oneshot(stacked, [*BEFORE[before](family), modifier])
    experts = [layer.num_experts for layer in find_moe_layers(alone)]
    assert [layer.num_experts for layer in find_moe_layers(stacked)] == experts
    assert change_of_median_token(logits(stacked), logits(alone)) < 0.05  # that of 8 bits
    quantized = {n for n, m in stacked.named_modules() if hasattr(m, "quantization_scheme")}
    assert {record.name for record in modifier.record.linears} == quantized
    assert len(modifier.record.linears) == len(quantized)

    stacked.save_pretrained(tmp_path / "saved")

    torch.testing.assert_close(logits(load_dequantized(tmp_path / "saved")), logits(stacked))
    if family != "gpt_oss":  # transformers has no rule for its per-expert tensors
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(logits(plain), logits(stacked))


@pytest.mark.parametrize("family", FAMILIES)
def test_awq_between_rotation_and_rounding(family, tmp_path):
    model = source(family, tmp_path / "source")
    original = logits(model)
    modifier = MoEQuantModifier(config_groups=int4(16, num_bits=8))
    oneshot(model, [ResidualRotationModifier(), MoEQuantAWQModifier(n_grid=4), modifier])
    assert change_of_median_token(logits(model), original) < 0.05  # that of 8 bits

    model.save_pretrained(tmp_path / "saved")

    torch.testing.assert_close(logits(load_dequantized(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("before", ["nothing", *BEFORE])
def test_schemes(scheme, before, tmp_path):
    family = "mixtral"  # the one whose experts are renamed when saved
    sizes = {"hidden_size": 128, "intermediate_size": 128} if scheme == "W4AFP8" else {}
    model = source(family, tmp_path / "source", **sizes)
    arguments, tolerance = SCHEMES[scheme]
    modifier = MoEQuantModifier(**arguments)
    oneshot(model, [*(BEFORE[before](family) if before in BEFORE else []), modifier])
    in_memory = logits(model)
    model.apply(disable_quantization)  # of activations and the cache: the weights are rounded
    weights_only = logits(model)

    model.save_pretrained(tmp_path / "saved")

    if scheme in MISREAD:
        assert any(MISREAD[scheme] in limit for limit in modifier.record.limits)
    else:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        if scheme in WEIGHTS_ONLY:
            torch.testing.assert_close(logits(plain), in_memory)
        else:  # experts are dequantized to bfloat16
            plain.apply(disable_quantization)
            assert change_of_median_token(logits(plain), weights_only) < 2**-7
    reloaded = logits(load_dequantized(tmp_path / "saved"))
    assert change_of_median_token(reloaded, weights_only) <= tolerance


@pytest.mark.parametrize(
    ("scheme", "message"),
    [("NVFP4A16", "other numbers, silently"), ("MXFP8A16", "MXFP8 experts and fails")],
)
def test_experts_that_plain_transformers_misreads(scheme, message, tmp_path):
    model = source("qwen3_moe", tmp_path / "source", dtype=torch.bfloat16)
    modifier = MoEQuantModifier(scheme=scheme)
    oneshot(model, modifier)
    in_memory = logits(model)
    model.save_pretrained(tmp_path / "saved")

    assert any(message in limit for limit in modifier.record.limits)
    assert torch.equal(logits(load_dequantized(tmp_path / "saved")), in_memory)
    try:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    except RuntimeError:
        assert "fails" in message
    else:
        assert change(logits(plain), in_memory) > 0.5


class TestRefuses:
    def refuse(self, family, directory, recipe, message, **arguments):
        model = tiny_model(family, directory)
        with pytest.raises(ValueError, match=message):
            oneshot(model, recipe, **arguments)

    def test_spinquant_where_the_host_has_no_mapping(self, tmp_path):
        recipe = [SpinQuantModifier(rotations=["R1"]), MoEQuantModifier(scheme="W8A8")]
        message = "no mapping for OlmoeForCausalLM.*router.*Use .*ResidualRotationModifier"
        self.refuse("olmoe", tmp_path, recipe, message)

    def test_quip(self, tmp_path):
        recipe = [QuIPModifier(transform_type="hadamard"), MoEQuantModifier(scheme="W8A8")]
        message = "QuIPModifier leaves a rotation .* run time.*Use .*ResidualRotationModifier"
        self.refuse("mixtral", tmp_path, recipe, message)

    @pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
    def test_smoothing_experts_and_not_their_router(self, family, tmp_path):
        recipe = [SmoothQuantModifier(), MoEQuantModifier(config_groups=int4(16))]
        message = r"post_attention_layernorm .* not in their router .*mappings=\[\[\["
        self.refuse(family, tmp_path, recipe, message)

    def test_smoothing_nothing(self, tmp_path):
        recipe = [SmoothQuantModifier(mappings=[]), MoEQuantModifier(config_groups=int4(16))]
        self.refuse("olmoe", tmp_path, recipe, "found nothing to smooth")

    @pytest.mark.parametrize(
        "other",
        [
            REAPPruningModifier(sparsity=0.5),
            SmoothQuantModifier(),
            SpinQuantModifier(),
            ResidualRotationModifier(),
        ],  # fmt: skip
    )
    def test_a_modifier_that_would_change_quantized_weights(self, other, tmp_path):
        recipe = [MoEQuantModifier(config_groups=int4(16)), other]
        message = f"{type(other).__name__} comes after .* Put it before"
        self.refuse("mixtral", tmp_path, recipe, message)

    def test_pruning_and_quantizing_in_one_pass(self, tmp_path):
        recipe = [REAPPruningModifier(sparsity=0.5), MoEQuantModifier(config_groups=int4(16))]
        message = "pipeline='sequential' runs REAPPruningModifier and .* Leave `pipeline` out"
        self.refuse("mixtral", tmp_path, recipe, message, pipeline="sequential")

    def test_a_budget_before_pruning(self, tmp_path):
        recipe = [REAPPruningModifier(sparsity=0.5), MoEQuantModifier(bits_per_weight=4.5)]
        message = "bits_per_weight is decided with all experts .* Prune in a run of its own"
        self.refuse("mixtral", tmp_path, recipe, message)

    def test_a_scheme_for_one_expert_before_pruning(self, tmp_path):
        groups = int4(16)
        groups["group_0"]["targets"] = [r"re:.*experts\.[0-2]\..*"]
        recipe = [REAPPruningModifier(sparsity=0.5), MoEQuantModifier(config_groups=groups)]
        message = "a scheme for some experts of model.layers.0.mlp is decided with all experts"
        self.refuse("mixtral", tmp_path, recipe, message)

    @pytest.mark.parametrize(
        ("before", "other"),
        [
            (REAPPruningModifier(sparsity=0.25), REAPPruningModifier(sparsity=0.5)),
            (ResidualRotationModifier(seed=0), ResidualRotationModifier(seed=1)),
        ],
    )
    def test_continuing_a_run_that_had_another_recipe(self, before, other, tmp_path):
        model = tiny_model("mixtral", tmp_path / "source")
        work = str(tmp_path / "work")
        oneshot(model, [before, MoEQuantModifier(config_groups=int4(16), work_dir=work)])

        recipe = [other, MoEQuantModifier(config_groups=int4(16), work_dir=work)]
        self.refuse("mixtral", tmp_path / "source", recipe, "modifier 0 of the recipe")


def test_smoothing_experts_together_with_their_router(tmp_path):
    mappings = [[["re:.*gate_proj$", "re:.*up_proj$", "re:.*mlp.gate$"],
                 "re:.*post_attention_layernorm$"]]  # fmt: skip
    alone, stacked = (uneven_model("olmoe", tmp_path) for _ in range(2))
    before = logits(alone)
    oneshot(alone, SmoothQuantModifier(mappings=mappings))

    recipe = MoEQuantModifier(config_groups=int4(None, num_bits=8))
    oneshot(stacked, [SmoothQuantModifier(mappings=mappings), recipe])

    assert change(logits(alone), before) < 1e-4
    assert change(logits(stacked), before) < 0.05


def test_a_pruned_run_that_was_killed_continues(tmp_path):
    whole, continued = (tiny_model("mixtral", tmp_path / "source") for _ in range(2))
    arguments = {"config_groups": int4(16), "work_dir": str(tmp_path / "work")}
    oneshot(whole, [REAPPruningModifier(sparsity=0.5), MoEQuantModifier(**arguments)])

    modifier = MoEQuantModifier(**arguments)
    said = []
    sink = logger.add(said.append, format="{message}", level="INFO")
    oneshot(continued, [REAPPruningModifier(sparsity=0.5), modifier])

    logger.remove(sink)
    assert torch.equal(logits(continued), logits(whole))
    taken_over = f"{len(modifier.record.linears)} linears taken over from"
    assert any(taken_over in line for line in said)


def test_the_recipe_is_written_and_read_back(tmp_path):
    model = uneven_model("mixtral", tmp_path / "source")
    kept = {"work_dir": str(tmp_path / "work")}
    ours = MoEQuantModifier(config_groups=int4(16), **kept)
    oneshot(model, [ResidualRotationModifier(seed=5), ours])
    model.save_pretrained(tmp_path / "saved")
    # a rerun, maybe on another machine, has no business in the directory of this run
    assert "work_dir" not in (tmp_path / "saved" / "recipe.yaml").read_text()

    again = uneven_model("mixtral", tmp_path / "source")
    oneshot(again, str(tmp_path / "saved" / "recipe.yaml"), dataset())

    assert torch.equal(logits(again), logits(model))
    assert "transform_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
