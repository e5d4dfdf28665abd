"""The comparison with other quantizers takes no contender at its word."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("llmcompressor")

from helpers import tiny_model

from moeq_plugin.core.grid import Grid

PATH = Path(__file__).parents[2] / "benchmarks" / "peer_evaluation.py"
SPEC = importlib.util.spec_from_file_location("peer_evaluation", PATH)
evaluation = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = evaluation
SPEC.loader.exec_module(evaluation)

GRID = Grid(3, 16)


def on_grid(rows, columns, grid, dtype=torch.float32, negative=False, seed=0):
    """Codes times scales, every code used somewhere."""
    g = torch.Generator().manual_seed(seed)
    groups = rows * columns // grid.group_size
    codes = torch.randint(grid.lowest, grid.highest + 1, (groups, grid.group_size), generator=g)
    zero = torch.zeros(groups, 1)
    if not grid.symmetric:
        zero = torch.randint(grid.lowest, grid.highest + 1, (groups, 1), generator=g)
    scale = (torch.rand(groups, 1, generator=g) + 0.1).to(dtype)
    if negative:
        scale[::2] *= -1
    return ((codes - zero).to(dtype) * scale).reshape(rows, columns)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_times_scales_are_on_the_grid(bits, dtype, symmetric):
    grid = Grid(bits, 16, symmetric)
    weight = on_grid(64, 64, grid, dtype, negative=symmetric)
    assert evaluation.is_on_grid(weight, grid)
    assert evaluation.is_on_grid(weight[:, :8], grid)  # a narrow row is one group
    assert not evaluation.is_on_grid(torch.randn(64, 64).to(dtype), grid)


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_value_between_two_points_is_off_the_grid(symmetric):
    grid = Grid(3, 16, symmetric)
    weight = on_grid(8, 64, grid)
    group = weight[5, 16:32]
    step = group.unique().diff().min()
    group[3] = group[3] + step / 4
    assert not evaluation.is_on_grid(weight, grid)


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_level_too_many_is_off_the_grid(symmetric):
    levels = torch.arange(-4.0, 5.0).repeat(2)[None, :16] * 0.3  # 9 of them, both extremes
    assert not evaluation.is_on_grid(levels, Grid(3, 16, symmetric))
    assert evaluation.is_on_grid(levels, Grid(4, 16, symmetric))


def test_zero_points_make_a_symmetric_grid_asymmetric():
    levels = torch.arange(8.0).repeat(2)[None] * 0.3  # 8 levels, none below zero
    assert evaluation.is_on_grid(levels, Grid(3, 16, symmetric=False))
    assert not evaluation.is_on_grid(levels, Grid(3, 16))


def test_a_zero_point_between_two_points_is_off_the_grid():
    levels = torch.arange(8.0).repeat(2)[None] * 0.3 + 0.1
    assert not evaluation.is_on_grid(levels, Grid(3, 16, symmetric=False))


def test_scales_for_narrower_groups_are_off_the_grid():
    weight = on_grid(8, 64, Grid(3, 16))
    assert evaluation.is_on_grid(weight, Grid(3, 16))
    assert not evaluation.is_on_grid(weight, Grid(3, 32))


def test_what_is_not_a_number_is_off_the_grid():
    for bad in (float("nan"), float("inf")):
        weight = on_grid(8, 64, GRID)
        weight[2, 3] = bad
        assert not evaluation.is_on_grid(weight, GRID)


def test_groups_of_zeros_and_of_one_value_are_on_the_grid():
    weight = torch.zeros(4, 16)
    weight[1, 3], weight[2] = 0.7, -0.2
    for grid in (Grid(2, 16), Grid(2, 16, symmetric=False)):
        assert evaluation.is_on_grid(weight, grid)


@pytest.fixture
def model(tmp_path):
    tiny_model("qwen2_moe", tmp_path)
    return evaluation.load_reference(tmp_path)


def delivered(model):
    linears = evaluation.quantized_linears(model)
    return {name: on_grid(*linear.weight.shape, GRID) for name, linear in linears.items()}


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_every_linear_but_routers_gates_and_head_is_asked_for(tmp_path, family):
    tiny_model(family, tmp_path)
    model = evaluation.load_reference(tmp_path)
    linears = evaluation.quantized_linears(model)
    projections = {name.split(".")[-1] for name in linears}
    assert {"o_proj", "gate_proj", "up_proj", "down_proj"} <= projections
    assert projections.isdisjoint({"lm_head", "gate", "shared_expert_gate"})
    experts = [n for n in linears if ".experts." in n]
    moe_layers = {n.split(".experts.")[0] for n in experts}
    assert len(experts) == 3 * 4 * len(moe_layers) > 0
    matrices = {n for n, p in model.named_parameters() if p.dim() > 1}
    left = matrices - {f"{n}.weight" for n in linears}
    kinds = {n.split(".")[-2] for n in left}
    assert kinds <= {"embed_tokens", "lm_head", "gate", "shared_expert_gate"}
    beside = evaluation.tensors_beside(model)
    assert not any("embed" in n or "lm_head" in n for n in beside)
    assert any(n.endswith("mlp.gate.weight") for n in beside)


def test_what_was_delivered_is_what_is_measured(model):
    weights = delivered(model)
    norm = "model.layers.1.input_layernorm.weight"
    beside = {
        norm: torch.full_like(model.get_parameter(norm), 0.5),
        "model.norm.weight": model.model.norm.weight.clone(),
    }
    assert evaluation.put_in(model, weights, beside, GRID) == 1
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
    assert (model.get_parameter(norm) == 0.5).all()


NAME = "model.layers.1.mlp.experts.2.down_proj"
FAULTS = {
    "missing": lambda model, weights, beside: weights.pop(NAME),
    "unknown": lambda model, weights, beside: weights.update({"lm_head": torch.zeros(1, 1)}),
    "of another shape": lambda model, weights, beside: weights.update({NAME: weights[NAME].T}),
    "unchanged": lambda model, weights, beside: weights.update(
        {NAME: model.get_submodule(NAME).weight.detach().clone()}
    ),
    "off the grid": lambda model, weights, beside: weights[NAME][3, 3].add_(0.01),
    "not finite": lambda model, weights, beside: beside.update(
        {"model.norm.weight": torch.full((64,), float("nan"))}
    ),
    "1 of another shape: model.norm.weight": lambda model, weights, beside: beside.update(
        {"model.norm.weight": torch.ones(1)}
    ),
    "1 unknown: model.embed_tokens.weight": lambda model, weights, beside: beside.update(
        {"model.embed_tokens.weight": model.model.embed_tokens.weight * 2}
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_and_named_before_anything_is_overwritten(model, fault):
    weights, beside = delivered(model), {}
    FAULTS[fault](model, weights, beside)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(evaluation.RefusedError, match=fault) as refusal:
        evaluation.put_in(model, weights, beside, GRID)
    if fault in ("missing", "of another shape", "unchanged", "off the grid"):
        assert f"1 {fault}: {NAME}" in str(refusal.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
