"""The matrix is what a slow loop over tokens gives, and no expert is missing from it."""

import numpy as np
import pytest
import torch

pytest.importorskip("llmcompressor")
pytest.importorskip("gguf")

from helpers import dataset, oneshot, tiny_model
from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import distributed, multiprocessing
from transformers import AutoModelForCausalLM

from moeq_plugin.integrations.llama_cpp.matrix_file import read_matrix, write_matrix
from moeq_plugin.integrations.llama_cpp.modifier import ImportanceModifier
from moeq_plugin.models.moe import find_moe_layers

STARVED = 2


def starved_model(directory):
    """A model that sends no token to one expert of its first layer."""
    model = tiny_model("qwen3_moe", directory, num_experts_per_tok=1)
    router = find_moe_layers(model)[0].router
    # whatever a token is, one of two opposite experts is above zero
    with torch.no_grad():
        router.weight[STARVED] = 0
        router.weight[[0, 1]] = torch.stack([router.weight[0], -router.weight[0]])
    model.save_pretrained(directory)
    return type(model).from_pretrained(directory, dtype=torch.float32)


def matrix_of(model, **settings):
    modifier = ImportanceModifier(**settings)
    oneshot(model, modifier)
    return modifier.matrix


def slow_mean_squares(model, power):
    """``[experts, in]`` of the first layer's gate and down, token by token in float64."""
    linearize_moe(model)
    (layer, *_) = find_moe_layers(model)
    calls = []
    layer.experts.register_forward_pre_hook(lambda _module, args: calls.append(args))
    for row in dataset()["input_ids"]:
        model(torch.tensor([row]))
    sums = [np.zeros((layer.num_experts, width)) for width in (64, 32)]
    weights = np.zeros(layer.num_experts)
    for tokens, index, share in calls:
        for token, experts, shares in zip(tokens.flatten(0, -2), index, share, strict=True):
            for expert, weight in zip(experts.tolist(), shares.tolist(), strict=True):
                module = layer.expert(expert)
                hidden = torch.nn.functional.silu(module.gate_proj(token)) * module.up_proj(token)
                for total, x in zip(sums, (token, hidden), strict=True):
                    total[expert] += weight**power * x.double().detach().numpy() ** 2
                weights[expert] += weight**power
    return [total / np.maximum(weights, 1e-30)[:, None] for total in sums], weights


@pytest.mark.parametrize("power", [0, 1, 2])
def test_it_is_the_weighted_mean_square_of_every_experts_tokens(tmp_path, power):
    model = tiny_model("qwen3_moe", tmp_path)
    found = matrix_of(model, affinity_power=power, min_effective_tokens=0)
    expected, weights = slow_mean_squares(tiny_model("qwen3_moe", tmp_path / "again"), power)
    assert (weights > 0).all()  # or the test would say nothing of what is borrowed
    for projection, squares in (("gate", expected[0]), ("up", expected[0]), ("down", expected[1])):
        of = found.tensors[f"blk.0.ffn_{projection}_exps.weight"]
        np.testing.assert_allclose(of.mean_squares, squares, rtol=2e-4)
    assert found.borrowed == ()


def test_an_expert_that_no_token_reaches_borrows_and_is_named(tmp_path):
    model = starved_model(tmp_path)
    found = matrix_of(model, min_effective_tokens=4)
    named = {name for name in found.borrowed if ".0.mlp.experts." in name}
    prefix = f"model.layers.0.mlp.experts.{STARVED}"
    assert {f"{prefix}.{p}_proj" for p in ("gate", "up", "down")} <= named
    _, weights = slow_mean_squares(starved_model(tmp_path / "again"), 1)
    assert weights[STARVED] == 0
    for projection in ("gate", "up", "down"):
        of = found.tensors[f"blk.0.ffn_{projection}_exps.weight"]
        # neither ones nor zeros: columns differ, as the layer's tokens do
        assert of.counts[STARVED] == 1 and of.mean_squares[STARVED].std() > 0


def test_the_model_stays_as_it_is(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    before = model(torch.tensor([[1, 2, 3]])).logits
    matrix_of(model)
    torch.testing.assert_close(model(torch.tensor([[1, 2, 3]])).logits, before)


def test_a_column_that_is_always_zero_counts_a_little():
    from moeq_plugin.integrations.llama_cpp.column_importance import column_mean_squares

    found = column_mean_squares(torch.diag(torch.tensor([2.0, 0.0, 4.0])), 1.0)
    assert found[0] == 1 and found[2] == 2 and 0 < found[1] < 1e-5


def on_a_rank(rank, rendezvous, directory):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    model = AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)
    modifier = ImportanceModifier(min_effective_tokens=4)
    oneshot(model, modifier, data=dataset(8).shard(2, rank, contiguous=True))
    write_matrix(directory / f"{rank}.gguf", modifier.matrix)
    distributed.destroy_process_group()


def test_two_ranks_give_what_one_process_gives(tmp_path):
    starved_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    one = matrix_of(model, min_effective_tokens=4)
    multiprocessing.start_processes(
        on_a_rank, (tmp_path / "rendezvous", tmp_path), nprocs=2, start_method="fork"
    )
    for rank in range(2):
        found = read_matrix(tmp_path / f"{rank}.gguf")
        assert (found.num_chunks, found.chunk_size) == (one.num_chunks, one.chunk_size)
        assert found.borrowed == one.borrowed and found.tensors.keys() == one.tensors.keys()
        for name, of in one.tensors.items():
            ours = found.tensors[name]
            np.testing.assert_array_equal(ours.counts, of.counts)
            np.testing.assert_allclose(ours.mean_squares, of.mean_squares, rtol=1e-3, err_msg=name)
