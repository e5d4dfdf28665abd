"""RWKV-6 and RWKV-7 compute what their authors' package computes, in every way to call them."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from rwkv_models import VERSIONS, rwkv_tokens, tiny_rwkv
from transformers import AutoConfig

from moeq_plugin.rwkv import (
    RWKV6Config,
    RWKV7Config,
    elementwise_parameters,
    to_official,
)
from moeq_plugin.rwkv.scan import rwkv7_scan

ELEMENTWISE = {
    "rwkv6": {f"att.time_maa_{x}" for x in "xwkvrg"} | {f"ffn.time_maa_{x}" for x in "kr"},
    "rwkv7": {f"att.x_{x}" for x in "rwkvag"} | {"att.k_k", "att.k_a", "att.r_k", "ffn.x_k"},
}


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture
def model(version):
    return tiny_rwkv(version)


@torch.no_grad()
def logits(model, ids, **arguments):
    return model(input_ids=ids, **arguments).logits


@torch.no_grad()
def step_by_step(model, ids):
    state, rows = None, []
    for token in ids.split(1, dim=1):
        output = model(input_ids=token, state=state)
        state = output.state
        rows.append(output.logits)
    return torch.cat(rows, 1), state


def authors_model(version, path, monkeypatch):
    """Load ``path`` by the PyPI package, which chooses its class by the environment on import."""
    specification = importlib.util.find_spec("rwkv.model")
    if specification is None:
        pytest.skip("the reference implementation is not installed (pip install rwkv)")
    monkeypatch.setenv("RWKV_V7_ON", "1" if version == "rwkv7" else "0")
    monkeypatch.setenv("RWKV_JIT_ON", "0")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    for name in ("script", "script_method"):  # it compiles anyway, for longer than it then runs
        monkeypatch.setattr(torch.jit, name, lambda function: function)
    monkeypatch.setattr(torch.jit, "ScriptModule", torch.nn.Module)
    package = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(package)
    return package.RWKV(str(path.with_suffix("")), "cpu fp32")


def test_logits_are_those_of_the_authors_package(version, model, tmp_path, monkeypatch):
    ids = rwkv_tokens(1, 40)
    torch.save(to_official(model.state_dict()), tmp_path / "model.pth")
    reference = authors_model(version, tmp_path / "model.pth", monkeypatch)

    prompt, _ = reference.forward(ids[0].tolist(), None, full_output=True)
    state, steps = None, []
    for token in ids[0].tolist():
        row, state = reference.forward([token], state)
        steps.append(row)

    assert prompt.std() > 0.5, "logits that are all alike prove nothing"
    torch.testing.assert_close(logits(model, ids)[0], prompt, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        step_by_step(model, ids)[0][0], torch.stack(steps), atol=1e-4, rtol=0
    )


def test_a_prompt_is_its_tokens_one_by_one(model):
    ids = rwkv_tokens(2, 36)

    torch.testing.assert_close(step_by_step(model, ids)[0], logits(model, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("first", [1, 40])
@torch.no_grad()
def test_a_prompt_in_two_pieces_is_one_prompt(model, first):
    ids = rwkv_tokens(2, 70)
    whole = model(input_ids=ids)

    start = model(input_ids=ids[:, :first])
    rest = model(input_ids=ids[:, first:], state=start.state)

    joined = torch.cat([start.logits, rest.logits], 1)
    torch.testing.assert_close(joined, whole.logits, atol=1e-4, rtol=0)
    for ours, theirs in zip(rest.state, whole.state, strict=True):
        for part, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(part, expected, atol=1e-4, rtol=1e-5)


def test_rows_of_a_batch_do_not_meet(model):
    ids = rwkv_tokens(3, 40)

    alone = torch.cat([logits(model, row[None]) for row in ids])

    torch.testing.assert_close(logits(model, ids), alone, atol=1e-4, rtol=0)


def test_padding_on_the_left_is_as_good_as_none(model):
    ids, padding = rwkv_tokens(2, 40), 7
    ids[0, :padding] = 0
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0

    padded = logits(model, ids, attention_mask=mask)

    alone = logits(model, ids[:1, padding:])
    torch.testing.assert_close(padded[:1, padding:], alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(padded[1:], logits(model, ids[1:]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_masked_tokens_leave_the_heads_as_they_were(model):
    state = model(rwkv_tokens(2, 20)).state

    after = model(rwkv_tokens(2, 5), attention_mask=torch.zeros(2, 5), state=state).state

    for layer, before in zip(after, state, strict=True):
        torch.testing.assert_close(layer.wkv, before.wkv)


def test_generate_takes_the_likeliest_token_each_time(model):
    ids = rwkv_tokens(2, 12)
    expected = ids
    for _ in range(10):
        best = logits(model, expected)[:, -1:].argmax(-1)
        expected = torch.cat([expected, best], 1)
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    assert torch.equal(model.generate(ids, **settings), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), expected)


def test_generate_feeds_one_token_at_a_time(model):
    lengths = []
    model.model.emb.register_forward_pre_hook(lambda _, ids: lengths.append(ids[0].shape[1]))

    model.generate(rwkv_tokens(1, 12), max_new_tokens=4, do_sample=False, eos_token_id=None)

    assert lengths == [12, 1, 1, 1]


def test_beams_take_their_state_along(model):
    ids = rwkv_tokens(2, 12)
    settings = {"max_new_tokens": 8, "num_beams": 3, "eos_token_id": None, "pad_token_id": 0}

    with_state = model.generate(ids, do_sample=False, **settings)

    assert torch.equal(
        with_state, model.generate(ids, do_sample=False, use_cache=False, **settings)
    )


def test_padded_prompts_generate_as_they_would_alone(model):
    ids, padding = rwkv_tokens(2, 12), 5
    ids[0, :padding] = 0
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    together = model.generate(ids, attention_mask=mask, **settings)

    alone = model.generate(ids[:1, padding:], **settings)
    assert torch.equal(together[:1, padding:], alone)


def test_every_parameter_has_a_gradient(model):
    ids = rwkv_tokens(2, 40)

    model.train()(input_ids=ids, labels=ids).loss.backward()

    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_loss_predicts_the_next_token(model):
    ids = rwkv_tokens(2, 20)
    output = model(input_ids=ids, labels=ids)

    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )

    torch.testing.assert_close(output.loss, expected)


@torch.no_grad()
def test_bfloat16_keeps_its_state_in_float32(model):
    ids = rwkv_tokens(2, 40)
    exact = logits(model, ids)

    output = model.bfloat16()(input_ids=ids)

    assert output.logits.dtype == torch.bfloat16
    assert {layer.wkv.dtype for layer in output.state} == {torch.float32}
    # three layers of sums with 8 bits; logits of another model would differ by 1.4 deviations
    assert (output.logits - exact).std() < 0.2 * exact.std()


@torch.no_grad()
def test_what_is_not_asked_for_is_absent(model):
    ids = rwkv_tokens(1, 5)

    assert model(input_ids=ids, use_cache=False).state is None
    assert model.train()(input_ids=ids).state is None
    assert len(model.eval()(input_ids=ids).state) == 3
    assert len(model(input_ids=ids, output_hidden_states=True).hidden_states) == 4
    assert isinstance(model(input_ids=ids, return_dict=False), tuple)
    every = logits(model, ids)
    torch.testing.assert_close(logits(model, ids, logits_to_keep=2), every[:, -2:])
    embedded = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, every)


def test_a_hook_sees_what_an_element_wise_weight_multiplies(version, model):
    seen = {}
    found = list(elementwise_parameters(model))
    for name, _, module in found:
        module.register_forward_hook(
            lambda m, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )

    logits(model, rwkv_tokens(2, 9))

    names = {f"model.blocks.{i}.{n}.weight" for i in range(3) for n in ELEMENTWISE[version]}
    assert {name for name, _, _ in found} == names == set(seen)
    for name, parameter, module in found:
        assert parameter is module.weight is model.get_parameter(name)
        inputs, output = seen[name]
        assert torch.equal(output, inputs * parameter)
        assert torch.broadcast_shapes(inputs.shape, parameter.shape) == inputs.shape


@torch.no_grad()
def test_an_error_of_k_a_is_multiplied_by_what_its_hook_sees(monkeypatch):
    model, keys, seen = tiny_rwkv("rwkv7", num_hidden_layers=1), [], []

    def scan(*arguments):
        keys.append(arguments[2].transpose(1, 2).flatten(2))
        return rwkv7_scan(*arguments)

    monkeypatch.setattr("moeq_plugin.rwkv.rwkv7.rwkv7_scan", scan)
    weight = model.model.blocks[0].att.k_a
    weight.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = rwkv_tokens(2, 9)

    logits(model, ids)
    weight.weight += 0.5
    logits(model, ids)

    torch.testing.assert_close(keys[1] - keys[0], 0.5 * seen[0])


def test_heads_fill_the_channels(version):
    config = {"rwkv6": RWKV6Config, "rwkv7": RWKV7Config}[version]
    with pytest.raises(ValueError, match="hidden_size must be a multiple of head_dim 64, got 96"):
        config(hidden_size=96)


RELOAD = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
import moeq_plugin.rwkv
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    saved = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        assert torch.equal(model(saved["ids"]).logits, saved["logits"])
        hidden = AutoModel.from_pretrained(folder)(saved["ids"]).last_hidden_state
        assert torch.equal(model.lm_head(hidden), saved["logits"])
"""


def test_a_saved_model_is_the_same_in_another_process(tmp_path):
    ids, folders = rwkv_tokens(2, 40), [str(tmp_path / version) for version in VERSIONS]
    for version, folder in zip(VERSIONS, folders, strict=True):
        model = tiny_rwkv(version)
        model.save_pretrained(folder)
        torch.save({"ids": ids, "logits": logits(model, ids)}, folder + "/expected.pt")

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", RELOAD, *folders], check=True, env=environment)


def test_a_new_model_has_values_everywhere(version):
    config = AutoConfig.for_model(
        version, vocab_size=50, hidden_size=32, num_hidden_layers=2, head_dim=16
    )
    model = type(tiny_rwkv(version))(config)

    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 10, name
    assert {parameter.shape for _, parameter, _ in elementwise_parameters(model)} == (
        {(1, 1, 32), (2, 16)} if version == "rwkv7" else {(1, 1, 32)}
    )
