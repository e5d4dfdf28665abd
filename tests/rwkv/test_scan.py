"""Chunks of tokens give what token after token gives."""

import math

import pytest
import torch

from moeq_plugin.rwkv.scan import CHUNK_6, CHUNK_7, rwkv6_scan, rwkv7_scan

BATCH, HEADS, SIZE = 2, 3, 8
STRONGEST_7 = -math.exp(-0.5)
LENGTHS = [1, 2, CHUNK_6, CHUNK_7 + 1, 2 * CHUNK_7 + 5]


def loop7(r, log_w, k, v, a, b, state):
    """Run the recurrence of RWKV-7 as it is written down."""
    outputs = []
    for t in range(r.shape[2]):
        correction = torch.einsum("bhvk,bhk,bhn->bhvn", state, a[:, :, t], b[:, :, t])
        added = v[:, :, t, :, None] * k[:, :, t, None, :]
        state = state * log_w[:, :, t, None, :].exp() + correction + added
        outputs.append(torch.einsum("bhvk,bhk->bhv", state, r[:, :, t]))
    return torch.stack(outputs, 2), state


def loop6(r, log_w, k, v, bonus, state):
    """Run the recurrence of RWKV-6 as it is written down."""
    outputs = []
    for t in range(r.shape[2]):
        added = k[:, :, t, :, None] * v[:, :, t, None, :]
        seen = state + bonus[None, :, :, None] * added
        outputs.append(torch.einsum("bhk,bhkv->bhv", r[:, :, t], seen))
        state = state * log_w[:, :, t, :, None].exp() + added
    return torch.stack(outputs, 2), state


def inputs7(tokens, decay=None, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    r, w, k, v, a, b = torch.randn(6, BATCH, HEADS, tokens, SIZE, generator=generator).to(dtype)
    log_decay = STRONGEST_7 * w.sigmoid() if decay is None else torch.full_like(w, decay)
    kappa = torch.nn.functional.normalize(a, dim=-1)
    state = torch.randn(BATCH, HEADS, SIZE, SIZE, generator=generator).to(dtype)
    return r, log_decay, k, v, -kappa, kappa * b.sigmoid(), state


def inputs6(tokens, decay=None, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    r, w, k, v = torch.randn(4, BATCH, HEADS, tokens, SIZE, generator=generator).to(dtype)
    log_decay = -(3 * w).exp() if decay is None else torch.full_like(w, decay)
    bonus = torch.randn(HEADS, SIZE, generator=generator).to(dtype)
    state = torch.randn(BATCH, HEADS, SIZE, SIZE, generator=generator).to(dtype)
    return r, log_decay, k, v, bonus, state


CASES = [
    pytest.param(rwkv6_scan, loop6, inputs6, id="rwkv6"),
    pytest.param(rwkv7_scan, loop7, inputs7, id="rwkv7"),
]


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(("scan", "loop", "inputs"), CASES)
def test_equals_the_loop_over_tokens(scan, loop, inputs, tokens):
    arguments = inputs(tokens)
    before = arguments[-1].clone()

    for actual, expected in zip(scan(*arguments), loop(*arguments), strict=True):
        torch.testing.assert_close(actual, expected)
    assert torch.equal(arguments[-1], before), "the state handed in was changed"


@pytest.mark.parametrize(
    ("scan", "loop", "inputs", "decay"),
    [
        pytest.param(rwkv7_scan, loop7, inputs7, STRONGEST_7, id="rwkv7-forgets-fast"),
        pytest.param(rwkv7_scan, loop7, inputs7, 0.0, id="rwkv7-keeps-all"),
        pytest.param(rwkv6_scan, loop6, inputs6, 0.0, id="rwkv6-keeps-all"),
        pytest.param(rwkv6_scan, loop6, inputs6, -30.0, id="rwkv6-forgets-fast"),
        pytest.param(rwkv6_scan, loop6, inputs6, -torch.inf, id="rwkv6-forgets-at-once"),
    ],
)
def test_any_decay_is_computed_in_float32(scan, loop, inputs, decay):
    exact, _ = loop(*inputs(3 * CHUNK_7, decay))
    actual, _ = scan(*inputs(3 * CHUNK_7, decay, dtype=torch.float32))

    # a thousand roundings of float32, relative to the largest output
    assert (actual - exact).abs().max() < 1000 * 2**-24 * exact.abs().max()


@pytest.mark.parametrize(("scan", "loop", "inputs"), CASES)
def test_a_weak_decay_after_a_strong_one_keeps_its_digits(scan, loop, inputs):
    arguments = list(inputs(CHUNK_6))
    arguments[1] = torch.where(torch.arange(CHUNK_6)[:, None] < 8, -0.6, -1e-3).expand_as(
        arguments[1]
    ).double() * (100 if scan is rwkv6_scan else 1)
    exact, _ = loop(*arguments)

    actual, _ = scan(*(x.float() for x in arguments))

    assert (actual - exact).abs().max() < 100 * 2**-24 * exact.abs().max()


@pytest.mark.parametrize("first", [1, CHUNK_7, 50])
@pytest.mark.parametrize(("scan", "loop", "inputs"), CASES)
def test_the_state_carries_everything_that_later_tokens_need(scan, loop, inputs, first):
    *sequences, state = inputs(70)
    bonus = [sequences.pop()] if scan is rwkv6_scan else []
    whole, last = scan(*sequences, *bonus, state)

    start, state = scan(*(x[:, :, :first] for x in sequences), *bonus, state)
    rest, state = scan(*(x[:, :, first:] for x in sequences), *bonus, state)

    torch.testing.assert_close(torch.cat([start, rest], 2), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize(("scan", "loop", "inputs"), CASES)
def test_gradients_equal_those_of_the_loop(scan, loop, inputs):
    gradients = []
    for function in (scan, loop):
        leaves = [x.requires_grad_() for x in inputs(CHUNK_7 + 3)]
        output, state = function(*leaves)
        gradients.append(torch.autograd.grad(output.square().sum() + state.sum(), leaves))

    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)
