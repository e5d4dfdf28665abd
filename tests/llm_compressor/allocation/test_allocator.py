"""A budget in, schemes and a checkpoint of exactly that size out."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import dataset, int4, oneshot, tiny_model, tokens
from transformers import AutoModelForCausalLM

pytest.importorskip("llmcompressor")

from safetensors import safe_open

from moeq_plugin import MoEQuantModifier
from moeq_plugin.core.allocation import Allocation, BitBudget, InfeasibleBudgetError, allocate_bits
from moeq_plugin.core.sensitivity import SensitivityTable
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity import SensitivityModifier
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity_config import SensitivityConfig
from moeq_plugin.integrations.llm_compressor.checkpoint.loading import load_dequantized
from moeq_plugin.models.moe import find_moe_layers

OPTIONS = ["W2A16_G16", "W3A16_G16", "W4A16_G16", "W8A16_G16", "UNQUANTIZED"]


def bf16_model(family, directory):
    tiny_model(family, directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def allocated(family, tmp_path, **arguments):
    out = tmp_path / "out"
    model = bf16_model(family, tmp_path / "model")
    arguments = {"bits_per_weight": 4.5, "options": OPTIONS, **arguments}
    oneshot(model, MoEQuantModifier(**arguments), batch_size=2, output_dir=str(out))
    return model, out


def stored_bytes(directory):
    with safe_open(directory / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("mixtral", "vllm"),
        ("qwen2_moe", "expert"),
        ("qwen3_moe", "gguf"),
        ("olmoe", "linear"),
        ("deepseek_v3", "vllm"),
    ],
)
def test_the_checkpoint_has_the_predicted_bytes_and_reloads_bit_by_bit(family, target, tmp_path):
    model, out = allocated(family, tmp_path, target=target)

    allocation = Allocation.load(out / "moeq_allocation.json")
    table = SensitivityTable.load(out / "moeq_sensitivity.json")
    assert allocation.bits_per_weight <= 4.5
    assert allocation.gap == 0
    assert len(set(allocation.choice.values())) > 1
    assert stored_bytes(out) == allocation.num_bytes + table.fixed_bytes
    ids = tokens(2, 16, seed=5)
    with torch.no_grad():
        assert torch.equal(load_dequantized(out)(ids).logits, model(ids).logits)


def test_units_of_the_target_have_one_scheme_in_the_config(tmp_path):
    _, out = allocated("qwen3_moe", tmp_path)
    config = json.loads((out / "config.json").read_text())["quantization_config"]

    for layer in (0, 1):
        matching = {
            number
            for number, group in config["config_groups"].items()
            for target in group["targets"]
            for expert in range(4)
            for name in ("gate_proj", "up_proj", "down_proj")
            if re.match(target[3:], f"model.layers.{layer}.mlp.experts.{expert}.{name}")
        }
        assert len(matching) == 1


@pytest.mark.parametrize(
    "name", ["mlp.shared_expert.down_proj", "mlp.experts.1.down_proj", "self_attn.o_proj"]
)
def test_a_loss_is_the_squared_error_on_tokens_that_did_not_round(name, tmp_path):
    """Brute force over the other half, with weights that stock rounding of one half gives."""
    name = f"model.layers.0.{name}"
    config = SensitivityConfig(gradient=False)
    modifier = SensitivityModifier(options=["W2A16_G16", "W4A16_G16"], config=config)
    data = dataset(16, 64)  # enough that no expert borrows
    oneshot(tiny_model("qwen2_moe", tmp_path / "a"), modifier, data, batch_size=2)
    one_half = data.select(range(0, 16, 2))
    rounded = tiny_model("qwen2_moe", tmp_path / "b")
    oneshot(rounded, MoEQuantModifier(config_groups=int4(16, num_bits=2)), one_half)

    from llmcompressor.modeling.moe.linearize import linearize_moe

    original = tiny_model("qwen2_moe", tmp_path / "c")
    linearize_moe(original)
    difference = (rounded.get_submodule(name).weight - original.get_submodule(name).weight).detach()
    inputs, routed = [], []
    original.get_submodule(name).register_forward_pre_hook(lambda _m, a: inputs.append(a[0]))
    block = original.model.layers[0].mlp
    block.experts.register_forward_pre_hook(lambda _m, a: routed.append(a))
    ids = torch.tensor(data["input_ids"])[1::2]
    with torch.no_grad():
        original(ids)
    x = inputs[0].flatten(0, -2).double()
    hidden, index, combine = routed[0]
    weights = torch.ones(len(x), dtype=torch.float64)
    share = 1.0
    if "shared_expert" in name:
        gate = torch.nn.functional.linear(hidden, block.shared_expert_gate.weight)
        weights = gate.sigmoid().flatten().double()
    elif ".experts." in name:
        weights = combine[index == 1].double()
        sums = torch.stack([combine[index == e].double().square().sum() for e in range(4)])
        smooth = (sums[1] + sums.sum() / ids.numel()) / (ids.numel() + 4)
        share = float(smooth / (sums[1] / ids.numel()))
    total = 0.0
    for row, weight in zip(x, weights.detach(), strict=True):
        total += float(weight) ** 2 * float((difference.double() @ row).square().sum()) / 2
    expected = share * total / ids.numel()

    table = modifier.table
    found = table.loss[0, table.rows.index(name), 0]
    assert found == pytest.approx(expected, rel=0.01)  # a code on a tie may fall either way


def test_measuring_changes_no_weight_and_rounding_less_costs_less(tmp_path):
    from llmcompressor.modeling.moe.linearize import linearize_moe

    untouched = tiny_model("mixtral", tmp_path / "untouched")
    linearize_moe(untouched)
    model = tiny_model("mixtral", tmp_path / "model")
    config = SensitivityConfig(interactions=True)
    modifier = SensitivityModifier(options=[*OPTIONS, "W8A8"], config=config)

    oneshot(model, modifier, batch_size=2)

    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in untouched.state_dict().items())
    loss = modifier.table.loss[0]
    assert (np.diff(loss[:, :4].sum(0)) < 0).all()
    assert (loss[:, 4] == 0).all()
    assert (loss[:, 5] > 0).all()
    interactions = modifier.table.interactions
    assert len(interactions) == len(find_moe_layers(model))
    assert all(1 <= found.eigenvalue < 2 for found in interactions.values())


def test_a_saved_table_is_solved_again_without_measuring(tmp_path):
    _, out = allocated("qwen3_moe", tmp_path)
    table = SensitivityTable.load(out / "moeq_sensitivity.json")
    wanted = allocate_bits(table, BitBudget(bits_per_weight=5.5))

    model = bf16_model("qwen3_moe", tmp_path / "again")
    path = str(out / "moeq_sensitivity.json")
    modifier = MoEQuantModifier(bits_per_weight=5.5, options=OPTIONS, sensitivity=path)
    oneshot(model, modifier, batch_size=2, output_dir=str(tmp_path / "out2"))

    found = Allocation.load(tmp_path / "out2" / "moeq_allocation.json")
    assert found.choice == wanted.choice


def test_an_allocation_is_applied_as_it_is_and_refused_where_it_would_be_misread(tmp_path):
    _, out = allocated("qwen3_moe", tmp_path, target="expert")
    path = str(out / "moeq_allocation.json")

    with pytest.raises(ValueError, match=r"(?s)mixes them.*layers.\d.mlp.experts: W.*and \d+ more"):
        oneshot(
            bf16_model("qwen3_moe", tmp_path / "again"),
            MoEQuantModifier(allocation=path, target="vllm"),
        )
    with pytest.raises(ValueError, match="for another model or other targets"):
        oneshot(
            bf16_model("qwen2_moe", tmp_path / "other"),
            MoEQuantModifier(allocation=path, target="linear"),
        )
    model = bf16_model("qwen3_moe", tmp_path / "third")
    oneshot(model, MoEQuantModifier(allocation=path, target="expert"), batch_size=2)
    choice = Allocation.load(path).choice
    for name, option in choice.items():
        scheme = getattr(model.get_submodule(name), "quantization_scheme", None)
        bits = 16 if scheme is None else scheme.weights.num_bits
        assert option.startswith(f"W{bits}") or bits == 16


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"bits_per_weight": 1.0}, InfeasibleBudgetError, "1 is too small.*bits per weight"),
        ({"size_gb": 1e-6}, InfeasibleBudgetError, "GB, of which"),
        ({"bits_per_weight": -3.0}, ValueError, "must be positive"),
        ({"bits_per_weight": 4.0, "scheme": "W4A16"}, ValueError, "exactly one of"),
        ({"bits_per_weight": 4.0, "size_gb": 1.0}, ValueError, "exactly one of"),
        ({"bits_per_weight": 4.0, "options": ["W4A16", "W2A16"]}, ValueError, "Add an option"),
        ({"bits_per_weight": 4.0, "target": "tensorrt"}, ValueError, "vllm"),
        ({"allocation": "missing.json"}, ValueError, "missing.json cannot be read: No such file"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refuses_before_calibration(wrong, error, message, tmp_path):
    model = bf16_model("qwen3_moe", tmp_path)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "experts" not in n}
    with pytest.raises(error, match=message):
        oneshot(model, MoEQuantModifier(**{"options": OPTIONS, **wrong}))
    after = dict(model.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in before.items())


def test_one_sequence_cannot_both_round_and_judge(tmp_path):
    model = bf16_model("qwen3_moe", tmp_path)
    modifier = MoEQuantModifier(bits_per_weight=4.5, options=OPTIONS)
    with pytest.raises(ValueError, match="at least two sequences"):
        oneshot(model, modifier, dataset(1))


def test_the_worst_domain_is_better_off_in_robust_mode(tmp_path):
    data = dataset(12).add_column("domain", [0, 1, 2] * 4)
    config = SensitivityConfig(domain_names=("wiki", "code", "math"))
    modifier = SensitivityModifier(options=OPTIONS, config=config)
    oneshot(bf16_model("qwen3_moe", tmp_path), modifier, data, batch_size=3)

    table = modifier.table
    budget = BitBudget(bits_per_weight=4.5)
    mean = allocate_bits(table, budget, target="expert")
    robust = allocate_bits(table, budget, target="expert", robust=True)

    assert table.domains == ("wiki", "code", "math")
    uniform = table.loss[:, :, 1].sum(1)  # W3 everywhere is the best uniform option that fits
    ratios = [
        max(a.losses[d] / u for d, u in zip(table.domains, uniform, strict=True))
        for a in (mean, robust)
    ]
    assert ratios[1] <= ratios[0]
    assert robust.value == pytest.approx(ratios[1])


def test_without_data_the_model_writes_what_it_is_measured_on(tmp_path):
    out = tmp_path / "out"
    modifier = MoEQuantModifier(
        bits_per_weight=4.5, options=OPTIONS, ebss={"num_sequences": 4, "seq_len": 16}
    )
    oneshot_without_data(bf16_model("olmoe", tmp_path / "model"), modifier, out)
    assert Allocation.load(out / "moeq_allocation.json").bits_per_weight <= 4.5


def oneshot_without_data(model, recipe, out):
    from helpers import NoProcessor
    from llmcompressor import oneshot as host

    host(model=model, recipe=recipe, processor=NoProcessor(), output_dir=str(out))


def test_the_recipe_beside_the_checkpoint_asks_for_the_same_budget(tmp_path):
    from llmcompressor.recipe import Recipe

    _, out = allocated("qwen3_moe", tmp_path)

    (modifier,) = Recipe.create_instance(str(out / "recipe.yaml")).modifiers
    assert modifier.bits_per_weight == 4.5
    assert modifier.config_groups is None
