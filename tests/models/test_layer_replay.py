"""A layer that runs again has the gradients that it had in the pass through the whole model."""

import pytest
import torch
from helpers import FAMILIES, tiny_model, tokens
from tiny_rwkv import tiny_rwkv
from torch import nn

from moeq_plugin.core.sampling import draw
from moeq_plugin.models.gradients import chances_of
from moeq_plugin.models.layer_replay import LayerReplay


def batches():
    """Return two batches, the second with padding on both sides."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = mask[1, 8:] = 0
    return [
        {"input_ids": tokens(3, 16, seed=1)},
        {"input_ids": tokens(2, 12, seed=2), "attention_mask": mask},
    ]


def linears_of(module):
    return {name: m for name, m in module.named_modules() if type(m) is nn.Linear}


def stack_of(model):
    """Return the list of a model's layers."""
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


class Sums:
    """Adds up ``g g^T`` at the outputs of linears in float64, token by token."""

    def __init__(self, linears):
        self.by_name = {n: torch.zeros(2 * [len(m.weight)]).double() for n, m in linears.items()}
        self.handles = [m.register_forward_hook(self.hook(name)) for name, m in linears.items()]

    def hook(self, name):
        def add(gradient):
            for g in gradient.flatten(0, -2).double():
                self.by_name[name] += torch.outer(g, g)

        return lambda _m, _args, output: output.register_hook(add) and None

    def close(self):
        for handle in self.handles:
            handle.remove()


def in_one_pass(model, seed):
    """Return what one plain backward pass of each batch gives."""
    sums = Sums(linears_of(stack_of(model)))
    for batch in batches():
        ids = batch["input_ids"]
        keep = batch.get("attention_mask", torch.ones_like(ids)).bool()
        (chances,) = [next(chances_of([i[k] for i, k in zip(ids, keep, strict=True)], seed))]
        logits = model(input_ids=ids, attention_mask=keep, use_cache=False).logits[keep]
        drawn = draw(logits.detach().softmax(-1), chances)
        nn.functional.cross_entropy(logits, drawn.flatten(), reduction="sum").backward()
    sums.close()
    return sums.by_name


def replayed(model, seed, **limits):
    layers = dict(stack_of(model).named_children())
    replay = LayerReplay(layers)
    replay.record(model, batches(), seed=seed, **{"max_tokens": 10**9, **limits})
    found, calls = {}, []
    for name, layer in layers.items():
        sums = Sums(linears_of(layer))
        replay.replay(layer, lambda: calls.append(1))
        sums.close()
        found |= {f"{name}.{inner}": moments for inner, moments in sums.by_name.items()}
    return found, replay.num_tokens, len(calls)


@pytest.mark.parametrize("family", [*FAMILIES, "rwkv7"])
def test_gradients_are_those_of_the_pass_through_the_whole_model(family, tmp_path):
    if family == "rwkv7":  # whose layers hand on a second tensor beside the stream
        model = tiny_rwkv(tmp_path, torch.float32).eval()
    else:
        model = tiny_model(family, tmp_path).eval()

    found, num_tokens, num_calls = replayed(model, seed=5)

    expected = in_one_pass(model, seed=5)
    assert num_tokens == 3 * 16 + 9 + 8
    assert num_calls == 2 * 2
    assert found.keys() == expected.keys()
    for name, moments in expected.items():
        size = float(moments.diagonal().mean())
        assert size > 0
        torch.testing.assert_close(found[name] / size, moments / size, rtol=1e-3, atol=1e-4)


def test_another_seed_draws_other_tokens(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path).eval()
    one, other = (replayed(model, seed)[0] for seed in (0, 1))
    again, _, _ = replayed(model, 0)
    assert all(torch.equal(again[name], moments) for name, moments in one.items())
    assert not any(torch.equal(other[name], moments) for name, moments in one.items())


def test_batches_end_where_the_tokens_of_all_processes_suffice(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path).eval()
    assert replayed(model, 0, max_tokens=48)[1] == 48
    assert replayed(model, 0, max_tokens=49)[1] == 48 + 17
    assert replayed(model, 0, max_tokens=49, tokens_before=1)[1] == 48
    assert replayed(model, 0, max_tokens=49, tokens_before=49)[1:] == (0, 0)


def test_the_model_comes_back_as_it_was(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path).eval()
    model.model.norm.weight.requires_grad = False
    needed = [p.requires_grad for p in model.parameters()]

    replayed(model, 0)

    assert [p.requires_grad for p in model.parameters()] == needed
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_gradients_do_not_come_back_through_is_refused(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path).eval()
    first = model.model.layers[1]
    first.register_forward_hook(lambda _m, _args, output: output.detach())
    with pytest.raises(ValueError, match=r"outputs of 0 \(2 of 2 layers\).*row_feedback"):
        replayed(model, 0)
