import math

import pytest
import torch
from helpers import FAMILIES, tiny_model, tokens

from moeq_plugin.models.evaluation import evaluate
from moeq_plugin.models.moe import find_moe_layers
from moeq_plugin.models.routing import RoutingRecorder
from moeq_plugin.models.routing_agreement import compare_routing, jaccard

pytest.importorskip("llmcompressor")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return [tiny_model("qwen3_moe", tmp_path_factory.mktemp("m"), seed=s) for s in (0, 1)]


def routing_of(model, ids):
    """Return ``[layers][tokens]`` sets of experts and ``[layers, tokens, experts]`` logits."""
    layers, logits = find_moe_layers(model), []
    handles = [
        layer.router.register_forward_hook(lambda _m, _a, result: logits.append(result[0]))
        for layer in layers
    ]
    with RoutingRecorder(layers) as recorder, torch.no_grad():
        model(input_ids=ids)
        index = recorder._stacked(recorder._index)
    for handle in handles:
        handle.remove()
    return [[set(t.tolist()) for t in layer] for layer in index], torch.stack(logits)


def test_equals_sets_and_float64_loops_over_tokens(pair):
    ids = tokens(3, 20)
    (ours, q), (theirs, p) = (routing_of(model, ids) for model in pair)
    p, q = p.double().softmax(-1), q.double().softmax(-1)

    found = evaluate(*pair, [ids[:1], ids[1:]]).routing

    for number, layer in enumerate(found.layers):
        pairs = list(zip(ours[number], theirs[number], strict=True))
        expected = [len(a & b) / len(a | b) for a, b in pairs]
        assert layer.jaccard == pytest.approx(sum(expected) / 60)
        of_sequences = torch.tensor(expected).view(3, 20).mean(1)
        assert layer.jaccard_stderr == pytest.approx(of_sequences.std().item() / math.sqrt(3))
        divergence = (p[number] * (p[number] / q[number]).log()).sum(-1)
        assert layer.router_kl == pytest.approx(divergence.mean().item(), rel=1e-4)
        for load, sets in ((layer.load, ours), (layer.reference_load, theirs)):
            assert list(load) == [sum(e in of for of in sets[number]) for e in range(4)]
    assert [layer.name for layer in found.layers] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_the_overall_numbers_are_means_over_layers(pair):
    batches = list(tokens(6, 16).split(2))
    found = evaluate(*pair, batches).routing
    assert found.jaccard == pytest.approx(sum(x.jaccard for x in found.layers) / 2)
    assert found.router_kl == pytest.approx(sum(x.router_kl for x in found.layers) / 2)
    assert found.worst.jaccard == min(x.jaccard for x in found.layers)
    singles = [evaluate(*pair, [row[None]]).routing.jaccard for b in batches for row in b]
    expected = torch.tensor(singles).std().item() / math.sqrt(6)
    assert found.jaccard_stderr == pytest.approx(expected, rel=1e-4)


def test_the_order_of_batches_changes_nothing(pair):
    batches = list(tokens(6, 16).split(2))
    one, other = (evaluate(*pair, b).routing for b in (batches, batches[::-1]))
    assert other.jaccard == pytest.approx(one.jaccard)
    assert other.router_kl == pytest.approx(one.router_kl)
    assert [x.load for x in other.layers] == [x.load for x in one.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_experts_agree_with_fused_ones(family, tmp_path):
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from transformers import AutoModelForCausalLM

    fused = tiny_model(family, tmp_path)
    linear = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    linearize_moe(linear)

    found = evaluate(linear, fused, [tokens(2, 16)])

    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.routing.jaccard == 1
    assert found.routing.router_kl == pytest.approx(0, abs=1e-6)
    assert all(x.load == x.reference_load and sum(x.load) for x in found.routing.layers)


def test_a_model_agrees_with_itself_and_keeps_no_hook(pair):
    found = evaluate(pair[0], pair[0], [tokens(2, 16)]).routing
    assert found.jaccard == 1
    assert found.router_kl == 0
    for layer in find_moe_layers(pair[0]):
        assert not layer.experts._forward_pre_hooks
        assert not layer.router._forward_hooks


def test_other_numbers_of_experts_are_not_compared(pair, tmp_path):
    pruned = tiny_model("qwen3_moe", tmp_path, num_experts=3)
    assert compare_routing(pruned, pair[0]) is None
    assert evaluate(pruned, pair[0], [tokens(2, 8)]).routing is None


def test_jaccard_of_sets_of_other_sizes():
    found = jaccard(torch.tensor([[0, 1, 2]]), torch.tensor([[2]]), 4)
    assert found.item() == pytest.approx(1 / 3)
