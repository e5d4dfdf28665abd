"""Scales of MoEQuantAWQModifier: what they are judged by, and that they are the best of all."""

import pytest
import torch
from helpers import FAMILIES, dataset, oneshot, tiny_model, tokens

pytest.importorskip("llmcompressor")

from awq_smoothing import (
    SEARCH,
    candidates,
    inputs_of,
    linearized,
    rounding,
    smooth,
    uneven_model,
    weighted_loss,
)
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache

from moeq_plugin.models.moe import find_moe_layers


@pytest.fixture(scope="module", params=FAMILIES)
def smoothed(request, tmp_path_factory):
    """Return a family's name, its model as it was, smoothed, and the record of that."""
    directory = tmp_path_factory.mktemp(request.param)
    original, model = (uneven_model(request.param, directory) for _ in range(2))
    return request.param, original, model, smooth(model)


def test_smoothing_leaves_the_model_as_it_was(smoothed):
    _, original, model, record = smoothed

    ids = tokens(2, 32, seed=3)
    ours, theirs = model(ids).logits, original(ids).logits
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    assert any(of["loss"] < of["loss_unscaled"] for of in record.smoothed.values())
    for norm in ("input_layernorm", "post_attention_layernorm"):
        names = [f"model.layers.{index}.{norm}" for index in range(2)]
        before, after = ([m.get_submodule(n).weight for n in names] for m in (original, model))
        assert set(names) <= set(record.smoothed)
        assert any((a / b - 1).abs().max() > 0.01 for a, b in zip(after, before, strict=True))


def test_what_a_block_reads_is_judged_whole_and_an_experts_linear_alone(smoothed):
    family, _, model, record = smoothed

    (layer, *_) = find_moe_layers(model)
    norm = layer.name.replace("mlp", "post_attention_layernorm")
    assert record.smoothed[norm]["judged by"] == layer.name
    assert not record.smoothed[norm]["weighted"]
    for e in range(layer.num_experts):
        name = f"{layer.name}.experts.{e}.up_proj"
        if family == "gpt_oss":
            assert "a clamp, an offset or a nonlinearity" in record.left_out[name]
        else:
            assert record.smoothed[name]["judged by"] == name.replace("up_proj", "down_proj")
            assert record.smoothed[name]["weighted"]
    shared = [of for name, of in record.smoothed.items() if "shared_expert" in name]
    assert [of["weighted"] for of in shared] == {
        "qwen2_moe": [True, True], "deepseek_v2": [False], "deepseek_v3": [False],
    }.get(family, [])  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss"])
def test_values_are_scaled_where_heads_are_not_grouped(family, tmp_path):
    grouped = smooth(tiny_model(family, tmp_path / "grouped"))
    model, original = (
        tiny_model(family, tmp_path / "each", num_key_value_heads=4) for _ in range(2)
    )
    each = smooth(model)

    assert "grouped-query attention" in grouped.left_out["model.layers.0.self_attn.v_proj"]
    assert "model.layers.0.self_attn.v_proj" in each.smoothed
    ids = tokens(2, 32, seed=3)
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)


class Recording(AWQModifier):
    """The host's modifier, telling what it found."""

    def _compute_best_scale(self, mapping, *args):
        scales = super()._compute_best_scale(mapping, *args)
        found[mapping.smooth_name] = self._error_metrics[-1] | {"scales": scales}
        return scales


found: dict[str, dict] = {}


@pytest.mark.parametrize("duo_scaling", [True, False, "both"])
def test_with_every_weight_one_the_hosts_scales_are_chosen(duo_scaling, tmp_path, monkeypatch):
    """B1. Of the host's mappings those of Qwen3-MoE are all that reads a norm."""
    monkeypatch.setattr(IntermediatesCache, "pin_memory", lambda *_: None)  # needs a GPU
    found.clear()
    ours, theirs = (tiny_model("qwen3_moe", tmp_path, num_hidden_layers=1) for _ in range(2))

    # a power of 0 makes every combine weight 1
    record = smooth(
        ours, affinity_power=0, min_effective_tokens=0, n_grid=10, duo_scaling=duo_scaling
    )
    host = Recording(n_grid=10, duo_scaling=duo_scaling, offload_device=None)
    oneshot(theirs, [host, rounding()], moe_calibrate_all_experts=False)

    assert record.smoothed.keys() == found.keys()
    assert len(found) == 2 + 4
    for name, of in record.smoothed.items():
        assert of["loss"] == pytest.approx(found[name]["best_error"], rel=1e-4)
        assert of["loss_unscaled"] == pytest.approx(found[name]["initial_error"], rel=1e-4)
    assert any((of["scales"] - 1).abs().max() > 0.01 for of in found.values())
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if "scale" not in name:
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("power", [1.0, 8.0])
def test_the_scales_of_an_expert_are_the_brute_force_optimum(power, tmp_path):
    """B2. All twenty scales, every token with its weight, in float64."""
    model = tiny_model("qwen3_moe", tmp_path, num_hidden_layers=1)
    original = linearized("qwen3_moe", tmp_path, num_hidden_layers=1)

    record = smooth(model, dataset(16, 32), affinity_power=power, min_effective_tokens=0, **SEARCH)

    chosen_otherwise = 0
    for e in range(4):
        expert = original.model.layers[0].mlp.experts[e]
        down = expert.down_proj.weight.detach()
        rows, weights = inputs_of(expert, e, "down_proj")
        tried = [
            (weighted_loss(change, rows, weights**power), weighted_loss(change, rows, 1), scales)
            for scales, change in candidates(down, rows, rows.abs().mean(0))
        ]
        least, _, best = min(tried, key=lambda x: x[0])
        _, _, unweighted_best = min(tried, key=lambda x: x[1])

        smoothed = model.model.layers[0].mlp.experts[e].down_proj.weight.detach()
        torch.testing.assert_close(smoothed, down * best, rtol=1e-3, atol=1e-6)
        of = record.smoothed[f"model.layers.0.mlp.experts.{e}.up_proj"]
        mean = least / (weights**power).sum().item() / len(down)
        assert of["loss"] == pytest.approx(mean, rel=1e-3)
        chosen_otherwise += not torch.allclose(best, unweighted_best)
    assert chosen_otherwise >= (power == 8.0)  # or the weights would not have been tested


@pytest.mark.parametrize("family", FAMILIES)
def test_no_power_changes_what_is_judged_by_a_whole_block(family, tmp_path):
    """B3. There the combine weights act already."""
    # the last layer only: before it, layers with other scales differ in the last bits
    depth = 2 if "deepseek" in family else 1
    first, second = (tiny_model(family, tmp_path, num_hidden_layers=depth) for _ in range(2))

    first_record = smooth(first, affinity_power=0, min_effective_tokens=0)
    second_record = smooth(second, affinity_power=8, min_effective_tokens=0)

    last = f"model.layers.{depth - 1}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        ours, theirs = (m.get_submodule(f"{last}.{norm}").weight for m in (first, second))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    losses = [
        {n: of["loss"] for n, of in r.smoothed.items()} for r in (first_record, second_record)
    ]
    assert losses[0][f"{last}.post_attention_layernorm"] == pytest.approx(
        losses[1][f"{last}.post_attention_layernorm"], rel=1e-4
    )
    weighted = [n for n, of in second_record.smoothed.items() if of["weighted"]]
    assert bool(weighted) == (family != "gpt_oss")
    differ = [losses[0][n] != pytest.approx(losses[1][n], rel=1e-2) for n in weighted]
    assert sum(differ) >= len(differ) / 2  # an expert that all tokens weight alike may not differ


def test_given_mappings_are_used(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    mapping = AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])
    record = smooth(model, mappings=[mapping])
    assert len(record.smoothed) == 2 * 4
    assert all(of["weighted"] for of in record.smoothed.values())
