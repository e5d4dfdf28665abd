import inspect

import pytest
import torch
from helpers import FAMILIES, tiny_model, tokens

from moeq_plugin.models.moe import RoutingTrace, UnsupportedModelError, find_moe_layers

transformers = pytest.importorskip("transformers")


def linearize(model):
    return pytest.importorskip("llmcompressor.modeling.moe.linearize").linearize_moe(model)


def capture(module, calls):
    """Record arguments and result of each call."""
    return module.register_forward_hook(lambda _module, args, output: calls.append((args, output)))


def recompose(layer, hidden_states, trace):
    """``sum_e C[:, e] * E_e(x) + shared``, expert by expert on all tokens."""
    combine = trace.combine_weights()
    total = torch.zeros_like(hidden_states)
    for e in range(layer.num_experts):
        total += combine[:, e, None] * layer.expert(e)(hidden_states)
    if layer.shared_expert is not None:
        weights = layer.shared_weights(hidden_states)
        shared = layer.shared_expert(hidden_states)
        total += shared if weights is None else weights[:, None] * shared
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_the_traced_weights_recompose_the_block(family, tmp_path):
    model = linearize(tiny_model(family, tmp_path))
    layer = find_moe_layers(model)[-1]
    of_experts, of_block = [], []
    capture(layer.experts, of_experts)
    capture(layer.block, of_block)

    with torch.no_grad():
        model(tokens(2, 16))

        (hidden_states, index, weights), _ = of_experts[0]
        hidden_states = hidden_states.flatten(0, -2)
        output = of_block[0][1]
        output = output[0] if isinstance(output, tuple) else output
        trace = RoutingTrace(index, weights, layer.num_experts)
        recomposed = recompose(layer, hidden_states, trace)

    torch.testing.assert_close(recomposed, output.reshape(recomposed.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_the_same_layers_fused_and_linearized(family, tmp_path):
    model = tiny_model(family, tmp_path)
    fused = [(layer.name, layer.num_experts) for layer in find_moe_layers(model)]
    linear = [(layer.name, layer.num_experts) for layer in find_moe_layers(linearize(model))]

    assert fused == linear
    expected = 1 if family.startswith("deepseek") else 2  # their first layer is dense
    assert len(fused) == expected
    assert all(count == 4 for _, count in fused)


@pytest.mark.parametrize("family", FAMILIES)
def test_knows_routers_and_shared_experts(family, tmp_path):
    layer = find_moe_layers(tiny_model(family, tmp_path))[-1]
    assert layer.router is not None
    assert (layer.shared_expert is not None) == (
        family in ("qwen2_moe", "deepseek_v2", "deepseek_v3")
    )
    assert (layer.shared_gate is not None) == (family == "qwen2_moe")


def test_a_dense_model_has_no_moe_layer(tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    config = transformers.LlamaConfig(num_attention_heads=2, **small)
    assert find_moe_layers(transformers.LlamaForCausalLM(config)) == []


def test_llama4_is_refused_because_its_score_multiplies_the_input():
    config = transformers.Llama4TextConfig(
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        vocab_size=32,
        pad_token_id=0,
    )
    model = transformers.Llama4ForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match="affinity weights would square them"):
        find_moe_layers(model)


def test_every_architecture_the_host_linearizes_hands_weights_to_its_experts():
    mappings = pytest.importorskip("llmcompressor.modeling.moe.conversion_mappings")
    helpers = pytest.importorskip("llmcompressor.modeling.moe.helpers")
    without = set()
    for family, (_, paths) in mappings.ARCH_TO_IMPORT_PATHS.items():
        experts = helpers.import_or_none(paths)
        assert experts is not None, family
        if len(inspect.signature(experts.forward).parameters) < 4:  # self and three tensors
            without.add(family)
    assert without == {"llama4"}


class TestRoutingTrace:
    @pytest.fixture
    def trace(self):
        index = torch.tensor([[2, 0], [0, 1], [2, 1], [0, 2]])
        weights = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
        return RoutingTrace(index, weights, num_experts=4)

    def test_combine_weights_are_dense(self, trace):
        expected = torch.tensor(
            [[0.1, 0, 0.9, 0], [0.8, 0.2, 0, 0], [0, 0.3, 0.7, 0], [0.6, 0, 0.4, 0]]
        )
        torch.testing.assert_close(trace.combine_weights(), expected)

    def test_dispatch_pairs_each_token_with_its_own_weight(self, trace):
        combine = trace.combine_weights()
        for expert, (token, weight) in enumerate(trace.dispatch()):
            torch.testing.assert_close(weight, combine[token, expert])

    def test_dispatch_lists_tokens_slot_after_slot(self, trace):
        for expert, (token, _) in enumerate(trace.dispatch()):
            # the order of torch.where on a [slots, tokens] mask, which is how experts are fed
            assert token.tolist() == torch.where((trace.top_k_index == expert).T)[1].tolist()

    def test_relabelling_experts_relabels_the_dispatch(self, trace):
        turned = RoutingTrace(3 - trace.top_k_index, trace.top_k_weights, 4)
        for ours, theirs in zip(trace.dispatch(), reversed(turned.dispatch()), strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
