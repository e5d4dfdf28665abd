"""MoEQuantModifier inside the host's real oneshot flow."""

import json

import pytest
import torch
import yaml
from helpers import dataset, int4, oneshot, tiny_model, tokens

pytest.importorskip("llmcompressor")

from datasets import Dataset
from llmcompressor.modifiers.gptq import GPTQModifier
from loguru import logger
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moeq_plugin import MoEQuantModifier
from moeq_plugin.integrations.llm_compressor import host
from moeq_plugin.models.moe import find_moe_layers
from moeq_plugin.records.progress import listening
from moeq_plugin.records.run import Basis, RunRecord


@pytest.fixture(autouse=True)
def _masks_for_both(monkeypatch):
    """Let the host's own runs have the causal masks, too, that it loses by itself."""
    monkeypatch.setattr(host, "_serves_us", lambda: True)


def quantized_weights(model):
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }


def share_of_equal(ours, theirs):
    equal = sum((ours[name] == theirs[name]).sum().item() for name in theirs)
    return equal / sum(weight.numel() for weight in theirs.values())


def record_of(modifier) -> RunRecord:
    return modifier.record


def starve(model, allowed):
    """Make every router of ``model`` choose among the experts in ``allowed`` only."""
    for layer in find_moe_layers(model):

        def reroute(_module, _args, output, layer=layer):
            logits, weights, index = output
            choice = torch.tensor(allowed)[index % len(allowed)]
            return logits, weights, choice

        layer.router.register_forward_hook(reroute)


class TestAgainstStockGPTQ:
    """With every weight 1 ours is GPTQ: the same codes up to ties of float32."""

    def compare(self, make, stock_arguments, our_arguments, **oneshot_arguments):
        stock, ours = make(), make()
        data = dataset(64, 64)
        groups = int4(32)
        oneshot(
            stock,
            GPTQModifier(config_groups=groups, ignore=["lm_head"]),
            data,
            **stock_arguments,
            **oneshot_arguments,
        )
        oneshot(
            ours,
            MoEQuantModifier(config_groups=int4(32), preset="fast", **our_arguments),
            data,
            **oneshot_arguments,
        )
        return quantized_weights(ours), quantized_weights(stock)

    def test_a_dense_model(self, tmp_path):
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
            vocab_size=128,
        )  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path)

        ours, stock = self.compare(
            lambda: AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), {}, {}
        )

        assert ours.keys() == stock.keys()
        assert share_of_equal(ours, stock) >= 0.9999

    def test_the_loss_is_the_one_that_the_host_logs(self, tmp_path):
        model = tiny_model("qwen3_moe", tmp_path, num_hidden_layers=1)
        logged = []
        sink = logger.add(logged.append, level="METRIC", format="{message}")
        oneshot(model, GPTQModifier(config_groups=int4(32), ignore=["lm_head"]), dataset(64, 64),
                moe_calibrate_all_experts=False)  # fmt: skip
        logger.remove(sink)
        theirs = [float(line.split()[-1]) for line in logged if line.startswith("error")]

        model = tiny_model("qwen3_moe", tmp_path, num_hidden_layers=1)
        modifier = MoEQuantModifier(
            config_groups=int4(32), affinity_power=0, min_effective_tokens=0, preset="fast"
        )
        oneshot(model, modifier, dataset(64, 64))

        # theirs is per calibration sequence, ours per token; the tokens all have weight one
        ours = [r.loss * r.effective_tokens / 64 for r in record_of(modifier).linears]
        assert len(ours) == len(theirs) == 4 + 4 * 3
        # logged with two decimals
        assert sorted(ours) == pytest.approx(sorted(theirs), rel=1e-4, abs=0.0051)

    def test_routed_tokens_of_weight_one(self, tmp_path):
        ours, stock = self.compare(
            lambda: tiny_model("qwen3_moe", tmp_path, num_hidden_layers=1),
            {"moe_calibrate_all_experts": False},
            {"affinity_power": 0, "min_effective_tokens": 0},
        )

        assert ours.keys() == stock.keys()
        assert share_of_equal(ours, stock) >= 0.9999


def test_calibrating_all_experts_or_routed_tokens_gives_the_same_weights(tmp_path):
    first, second = (tiny_model("deepseek_v3", tmp_path) for _ in range(2))

    oneshot(first, MoEQuantModifier(config_groups=int4(16)), moe_calibrate_all_experts=True)
    oneshot(second, MoEQuantModifier(config_groups=int4(16)), moe_calibrate_all_experts=False)

    theirs = quantized_weights(second)
    assert all(torch.equal(w, theirs[name]) for name, w in quantized_weights(first).items())


def test_static_activation_scales_see_all_tokens(tmp_path):
    model = tiny_model("mixtral", tmp_path)
    starve(model, [0, 1])
    groups = int4(None, num_bits=8)
    groups["group_0"]["input_activations"] = {"num_bits": 8, "type": "int", "symmetric": True}

    oneshot(model, MoEQuantModifier(config_groups=groups))

    experts = model.model.layers[0].mlp.experts
    scales = torch.stack([experts[e].up_proj.input_scale for e in range(4)])
    assert (scales == scales[0]).all()  # all saw the same tokens, routed to them or not
    assert scales[0] > 1e-3


class TestCoverage:
    """No weight is ever zeroed for lack of tokens, and the record says what was borrowed."""

    def test_an_expert_without_any_token_takes_the_layers_second_moments(self, tmp_path):
        model = tiny_model("mixtral", tmp_path, seed=1)
        starve(model, [0, 1])
        modifier = MoEQuantModifier(config_groups=int4(16))

        oneshot(model, modifier)

        starved = [r for r in record_of(modifier).linears if r.basis is Basis.LAYER]
        assert len(starved) == 2 * 2 * 3  # layers, experts, linears
        assert all("experts.2." in r.name or "experts.3." in r.name for r in starved)
        assert all(r.effective_tokens == 0 for r in starved)
        for name, weight in quantized_weights(model).items():
            assert weight.isfinite().all(), name
            assert (weight != 0).float().mean() > 0.5, name

    def test_borrowing_is_what_all_tokens_would_have_given(self, tmp_path):
        """A starved expert ends like stock GPTQ's, which runs every expert on every token."""
        ours, stock = (tiny_model("mixtral", tmp_path, num_hidden_layers=1) for _ in range(2))
        starve(ours, [0, 1])
        starve(stock, [0, 1])

        oneshot(ours, MoEQuantModifier(config_groups=int4(16), preset="fast"), dataset(16, 32))
        oneshot(stock, GPTQModifier(config_groups=int4(16), ignore=["lm_head"]), dataset(16, 32))

        name = "model.layers.0.mlp.experts.2."
        theirs = {k: w for k, w in quantized_weights(stock).items() if k.startswith(name)}
        assert len(theirs) == 3
        assert share_of_equal(quantized_weights(ours), theirs) >= 0.999

    def test_one_token_is_mixed_with_the_layer(self, tmp_path):
        model = tiny_model("mixtral", tmp_path)
        modifier = MoEQuantModifier(config_groups=int4(16))

        oneshot(model, modifier, Dataset.from_dict({"input_ids": [[5]]}))

        expert = [r for r in record_of(modifier).linears if ".experts." in r.name]
        shrunk = [r for r in expert if r.basis is Basis.SHRUNK]
        assert {round(r.effective_tokens) for r in shrunk} == {1}
        assert len(shrunk) == 2 * 2 * 3  # the token's two experts in each layer
        assert sum(r.basis is Basis.LAYER for r in expert) == 2 * 2 * 3
        assert all(w.isfinite().all() for w in quantized_weights(model).values())

    def test_a_batch_that_is_all_padding_rounds_to_nearest(self, tmp_path):
        model = tiny_model("qwen3_moe", tmp_path)
        original = {k: w.clone() for k, w in model.state_dict().items() if "q_proj" in k}
        # a search may clip: the largest weights are then further than half a step away
        modifier = MoEQuantModifier(config_groups=int4(16), preset="fast")
        data = Dataset.from_dict({"input_ids": [[1] * 8], "attention_mask": [[0] * 8]})

        oneshot(model, modifier, data)

        record = record_of(modifier)
        assert record.count(Basis.NONE) == len(record.linears)
        assert all(r.loss is None for r in record.linears)
        for name, weight in quantized_weights(model).items():
            assert weight.isfinite().all() and (weight != 0).float().mean() > 0.5, name
            if f"{name}.weight" in original:  # nearest: at most half a step of an int4 grid away
                change = (weight - original[f"{name}.weight"]).abs().max()
                assert change <= 0.51 * model.get_submodule(name).weight_scale.max()

    def test_the_hosts_solver_zeroes_nothing_either(self, tmp_path):
        model = tiny_model("qwen3_moe", tmp_path)
        modifier = MoEQuantModifier(scheme="FP8_DYNAMIC")
        data = Dataset.from_dict({"input_ids": [[1] * 8], "attention_mask": [[0] * 8]})

        oneshot(model, modifier, data)

        for name, weight in quantized_weights(model).items():
            assert (weight != 0).float().mean() > 0.9, name

    def test_a_linear_that_is_never_called_is_rounded_and_reported(self, tmp_path):
        model = tiny_model("qwen3_moe", tmp_path)
        model.model.layers[0].self_attn.idle = torch.nn.Linear(64, 64, bias=False)
        modifier = MoEQuantModifier(config_groups=int4(16))

        oneshot(model, modifier)

        idle = [r for r in record_of(modifier).linears if r.name.endswith("idle")]
        assert [r.basis for r in idle] == [Basis.NONE]

    def test_data_that_reach_nothing_at_all_are_refused(self, tmp_path):
        """As of a model that the host cuts so that none of its layers is called with data."""
        model = tiny_model("qwen3_moe", tmp_path)
        model.model.layers[0].self_attn.idle = torch.nn.Linear(64, 64, bias=False)
        before = model.model.layers[0].self_attn.idle.weight.clone()
        modifier = MoEQuantModifier(config_groups=int4(16), ignore=["re:.*(proj|head)$"])

        with pytest.raises(ValueError, match=r"reached none of 1 linears.*idle.*pipeline"):
            oneshot(model, modifier, output_dir=str(tmp_path / "out"))

        assert not (tmp_path / "out").exists()
        idle = model.model.layers[0].self_attn.idle
        assert torch.equal(idle.weight, before) and not hasattr(idle, "weight_scale")

    def test_enough_tokens_are_left_alone(self, tmp_path):
        modifier = MoEQuantModifier(config_groups=int4(16), min_effective_tokens=2)
        oneshot(tiny_model("mixtral", tmp_path), modifier)
        assert {r.basis for r in record_of(modifier).linears} == {Basis.OWN}


def test_routers_gates_and_output_embedding_stay_in_16_bit(tmp_path):
    model = tiny_model("qwen2_moe", tmp_path)
    modifier = MoEQuantModifier(config_groups=int4(16))

    oneshot(model, modifier)

    touched = quantized_weights(model)
    assert not any("gate" in n and "gate_proj" not in n for n in touched)
    assert "lm_head" not in touched
    assert set(record_of(modifier).kept) == {
        "lm_head",
        "model.layers.0.mlp.shared_expert_gate",
        "model.layers.1.mlp.shared_expert_gate",
    }


def test_what_is_targeted_by_name_is_quantized(tmp_path):
    model = tiny_model("qwen2_moe", tmp_path)
    groups = int4(16)
    groups["group_0"]["targets"] = ["Linear", "lm_head"]

    oneshot(model, MoEQuantModifier(config_groups=groups))

    assert "lm_head" in quantized_weights(model)


@pytest.mark.parametrize(
    ("group_size", "symmetric", "num_bits"),
    [(16, True, 2), (16, True, 3), (None, True, 4), (16, False, 4), (None, True, 8)],
    ids=["2-bit", "3-bit", "channel", "asymmetric", "8-bit"],
)
def test_every_weight_lies_on_its_grid(group_size, symmetric, num_bits, tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)

    groups = int4(group_size, symmetric=symmetric, num_bits=num_bits)
    oneshot(model, MoEQuantModifier(config_groups=groups))

    for name, weight in quantized_weights(model).items():
        module = model.get_submodule(name)
        repeat = weight.shape[1] // module.weight_scale.shape[1]
        scale = module.weight_scale.repeat_interleave(repeat, 1)
        codes = weight / scale + module.weight_zero_point.repeat_interleave(repeat, 1)
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert codes.min() >= -(2 ** (num_bits - 1)) - 0.1
        assert codes.max() <= 2 ** (num_bits - 1) - 0.9


@pytest.mark.parametrize(
    ("symmetric", "dtype", "named"),
    [(False, torch.bfloat16, True), (True, torch.bfloat16, False), (False, torch.float32, False)],
    ids=["asymmetric-bf16", "symmetric-bf16", "asymmetric-fp32"],
)
def test_codes_that_saving_may_move_are_named(symmetric, dtype, named, tmp_path):
    tiny_model("qwen3_moe", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    modifier = MoEQuantModifier(config_groups=int4(16, symmetric=symmetric, num_bits=8))
    oneshot(model, modifier, dataset(2, 16))
    assert any("may move a code by one" in limit for limit in record_of(modifier).limits) == named


def test_schemes_that_our_grid_does_not_know_go_to_the_hosts_solver(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    modifier = MoEQuantModifier(scheme="FP8_DYNAMIC")
    oneshot(model, modifier)
    assert len(quantized_weights(model)) == len(record_of(modifier).linears) == 2 * (4 + 4 * 3)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    runs = []
    for _ in range(2):
        model = tiny_model("mixtral", tmp_path)
        oneshot(model, MoEQuantModifier(config_groups=int4(16), seed=7), dataset(200, 32))
        runs.append(quantized_weights(model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


RECIPE = """
quant_stage:
  quant_modifiers:
    MoEQuantModifier:
      affinity_power: 2
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 16}
"""


def test_a_yaml_recipe_and_its_copy_beside_the_checkpoint_give_one_result(tmp_path):
    first = tiny_model("qwen3_moe", tmp_path / "model")
    second = tiny_model("qwen3_moe", tmp_path / "model")

    oneshot(first, RECIPE, output_dir=str(tmp_path / "out"))
    written = (tmp_path / "out" / "recipe.yaml").read_text()
    oneshot(second, written)

    assert "MoEQuantModifier" in yaml.safe_load(written)["quant_stage"]["quant_modifiers"]
    theirs = quantized_weights(second)
    # saving has compressed the first model: compare what the checkpoint gives
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    x = tokens(1, 16)
    torch.testing.assert_close(first(x).logits, second(x).logits, rtol=1e-4, atol=1e-4)
    assert len(theirs) == 2 * (4 + 4 * 3)


def test_what_transformers_will_misread_is_said_before_measuring(tmp_path):
    said = []
    sink = logger.add(said.append, format="{message}", level="WARNING")
    budget = MoEQuantModifier(bits_per_weight=8.0, options=["W4A16_G16", "W8A16_G16"])
    with listening(lambda step: said.append(step.phase)):
        oneshot(tiny_model("qwen3_moe", tmp_path, num_hidden_layers=1), budget)
    logger.remove(sink)

    (warning,) = [number for number, text in enumerate(said) if "silently wrong" in text]
    assert "W4A16_G16 and of others W8A16_G16" in said[warning]
    assert warning < said.index("measure")


def test_a_run_that_starved_warns_whatever_the_log_says(tmp_path, recwarn):
    model = tiny_model("qwen3_moe", tmp_path, num_hidden_layers=1)
    oneshot(model, MoEQuantModifier(config_groups=int4(16)), dataset(16, 64))
    assert not [w for w in recwarn if "calibrate on more text" in str(w.message)]
    with pytest.warns(UserWarning, match=r"16 of 16 linears .* calibrate on more text"):
        oneshot(
            tiny_model("qwen3_moe", tmp_path, num_hidden_layers=1),
            MoEQuantModifier(config_groups=int4(16)),
            dataset(1, 16),
        )


def test_stacks_after_another_modifier(tmp_path):
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    model = tiny_model("qwen3_moe", tmp_path)
    mappings = [[["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"]]
    before = model.model.layers[0].input_layernorm.weight.clone()
    modifier = MoEQuantModifier(config_groups=int4(16))

    oneshot(model, [SmoothQuantModifier(mappings=mappings), modifier])

    assert not torch.equal(before, model.model.layers[0].input_layernorm.weight)
    assert len(record_of(modifier).linears) == 2 * (4 + 4 * 3)


def test_two_of_them_share_the_work_and_both_are_recorded(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path / "model")
    experts, attention = int4(16), int4(16, num_bits=8)
    experts["group_0"]["targets"] = ["re:.*mlp.*_proj$"]
    attention["group_0"]["targets"] = ["re:.*self_attn.*_proj$"]
    recipe = [
        MoEQuantModifier(config_groups=experts, group="experts"),
        MoEQuantModifier(config_groups=attention, group="attention"),
    ]

    oneshot(model, recipe, output_dir=str(tmp_path / "out"))

    runs = json.loads((tmp_path / "out" / "moeq_run.json").read_text())["runs"]
    assert [len(run["linears"]) for run in runs] == [2 * 4 * 3, 2 * 4]


def test_the_record_beside_the_checkpoint_reads_back(tmp_path):
    model = tiny_model("mixtral", tmp_path / "model")
    modifier = MoEQuantModifier(config_groups=int4(16))

    oneshot(model, modifier, output_dir=str(tmp_path / "out"))

    (loaded,) = RunRecord.load(tmp_path / "out")
    assert loaded == record_of(modifier)
    assert loaded.settings["affinity_power"] == 1.0
    assert loaded.versions["llmcompressor"]
