"""Squared gradients predict KL divergence: measured against small changes of real weights."""

import copy

import pytest
import torch
from helpers import tiny_model, tokens
from rwkv_models import rwkv_tokens, tiny_rwkv

from moeq_plugin.models.gradients import OutputGradients, limited
from moeq_plugin.models.moe import find_moe_layers

pytest.importorskip("llmcompressor")


@pytest.fixture
def model(tmp_path):
    from llmcompressor.modeling.moe.linearize import linearize_moe

    model = tiny_model("qwen2_moe", tmp_path, num_hidden_layers=1)
    linearize_moe(model)
    return model.eval()


def gradients(model, batches, *, seeds=(0,), **options):
    names = {m: n for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    found = OutputGradients(names, find_moe_layers(model))
    for seed in seeds:
        found.measure(model, batches, seed=seed, **{"max_tokens": 10**9, **options})
    return {names[m]: weights for m, weights in found.row_weights().items()}


@torch.no_grad()
def mean_kl(model, changed, ids):
    ours, theirs = (m(ids).logits.double().log_softmax(-1) for m in (changed, model))
    return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.1.down_proj",
        "model.layers.0.mlp.experts.2.up_proj",
        "model.layers.0.mlp.shared_expert.down_proj",
        "model.layers.0.self_attn.o_proj",
    ],
)
def test_a_small_change_of_one_output_costs_what_the_gradients_say(name, model):
    """In a last layer tokens do not meet again, so the diagonal is all there is per token.

    The estimate is a mean over drawn tokens: 64 draws of 64 tokens leave about 10 % of noise.
    """
    ids = tokens(2, 32, seed=1)
    weights = gradients(model, [{"input_ids": ids}], seeds=range(64))[name]
    row = int(weights.argmax())
    caught = []
    linear = model.get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    routed = []
    experts = find_moe_layers(model)[0].experts
    hook = experts.register_forward_pre_hook(lambda _m, args: routed.append(args))
    model(ids)
    handle.remove(), hook.remove()
    direction = torch.randn(linear.in_features, generator=torch.Generator().manual_seed(2))
    change = 1e-3 * direction
    effect = (caught[0].flatten(0, -2) @ change).square()
    if ".experts." in name:
        _, index, combine = routed[0]
        position, slot = torch.where((index == int(name.split(".")[-2])).T)[::-1]
        effect = effect * combine[position, slot].square()
    elif "shared" in name:
        layer = find_moe_layers(model)[0]
        effect = effect * layer.shared_weights(caught_input(model, layer, ids)).square()
    predicted = float(weights[row]) * effect.sum().item() / ids.numel() / 2

    changed = copy.deepcopy(model)
    changed.get_submodule(name).weight.data[row] += change

    assert predicted == pytest.approx(mean_kl(model, changed, ids), rel=0.25)


def caught_input(model, layer, ids):
    inputs = []
    hook = layer.shared_expert.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    model(ids)
    hook.remove()
    return inputs[0].flatten(0, -2)


def test_padding_does_not_count(model):
    ids = tokens(2, 8, seed=3)
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=ids.dtype)], dim=1)
    mask = (torch.arange(12) < 8).long().expand(2, -1)

    plain = gradients(model, [{"input_ids": ids}])
    with_padding = gradients(model, [{"input_ids": padded, "attention_mask": mask}])

    # the same tokens are drawn: padded positions are left out before drawing
    for name, weights in plain.items():
        torch.testing.assert_close(with_padding[name], weights, rtol=1e-4, atol=1e-9)


def test_a_sequence_draws_the_same_in_any_batch(model):
    ids = tokens(4, 16, seed=4)

    together = gradients(model, [{"input_ids": ids}], router_weight=0.5)
    apart = gradients(
        model, [{"input_ids": part} for part in (ids[2:], ids[1:2], ids[:1])], router_weight=0.5
    )

    for name, weights in together.items():
        torch.testing.assert_close(apart[name], weights, rtol=1e-4, atol=1e-9)


def test_the_model_comes_back_as_it_was(model):
    needed = [p.requires_grad for p in model.parameters()]

    gradients(model, [{"input_ids": tokens(1, 8)}])

    assert [p.requires_grad for p in model.parameters()] == needed
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_protecting_routers_weighs_what_runs_before_them(tmp_path):
    from llmcompressor.modeling.moe.linearize import linearize_moe

    model = tiny_model("mixtral", tmp_path, num_hidden_layers=2)
    linearize_moe(model)
    batches = [{"input_ids": tokens(2, 16)}] * 8

    plain, protected = (gradients(model, batches, router_weight=w) for w in (0.0, 100.0))

    before = "model.layers.0.self_attn.o_proj"
    behind = "model.layers.1.mlp.experts.0.down_proj"
    assert protected[before].mean() > 2 * plain[before].mean()
    assert protected[behind].mean() < 2 * plain[behind].mean()  # no router follows


def test_an_expert_without_tokens_takes_its_weights_from_the_others(model):
    layer = find_moe_layers(model)[0]
    names = {m: n for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    found = OutputGradients(names, [layer])
    found.measure(model, [{"input_ids": torch.full((1, 2), 7)}], max_tokens=1)
    unused = [e for e in range(4) if found._weights[layer.expert(e).down_proj] == 0]

    weights = found.row_weights()

    assert unused
    assert all((weights[layer.expert(e).down_proj] > 0).all() for e in unused)


def random_gradient(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_a_limit_shortens_single_tokens_and_turns_none():
    gradient = random_gradient(2, 40, 8)
    gradient[0, 7] *= 1000
    found = limited(gradient, 10.0)
    norm = gradient[0].norm(dim=-1)
    assert found[0, 7].norm() == pytest.approx(10 * float(norm.median()), rel=1e-5)
    torch.testing.assert_close(found[0, 7] / found[0, 7].norm(), gradient[0, 7] / norm[7])
    others = torch.arange(40) != 7
    assert torch.equal(found[0, others], gradient[0, others])
    assert torch.equal(found[1], gradient[1])  # every sequence has its own median


def test_padding_is_not_what_is_usual():
    gradient = random_gradient(1, 40, 8)
    gradient[0, 7] *= 1000
    padded = torch.cat([gradient, torch.zeros(1, 100, 8)], 1)
    assert torch.equal(limited(padded, 10.0)[:, :40], limited(gradient, 10.0))
    assert torch.equal(limited(torch.zeros(1, 5, 8), 10.0), torch.zeros(1, 5, 8))
    assert limited(torch.zeros(0, 8), 10.0).shape == (0, 8)  # an expert without tokens


def test_what_explodes_behind_a_linear_weighs_no_more_than_the_limit():
    """Nor does it before that linear, where a state spreads it over all earlier tokens."""
    model, ids = tiny_rwkv("rwkv7", num_hidden_layers=2), rwkv_tokens(2, 32)
    names = {m: n for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    block = model.model.blocks[1].att

    def mean_weights(limit):
        found = OutputGradients(names, [], limit)
        found.measure(model, [{"input_ids": ids}], max_tokens=10**9)
        return {names[m]: float(w.mean()) for m, w in found.row_weights().items()}

    def explode(_module, _args, output):
        mixed, *rest = output
        is_last = (torch.arange(mixed.shape[1]) == mixed.shape[1] - 1)[:, None]
        return mixed + 9999 * (mixed - mixed.detach()) * is_last, *rest

    plain = mean_weights(None)
    hook = block.register_forward_hook(explode)
    exploded, bounded = mean_weights(None), mean_weights(10.0)
    hook.remove()
    for part in ("output", "value", "key"):
        name = f"model.blocks.1.att.{part}"
        assert exploded[name] > 1e4 * plain[name]
        assert bounded[name] < 100 * plain[name]
