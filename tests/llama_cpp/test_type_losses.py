"""Losses of types are those of the quantizer that ships, on the tokens that did not round."""

import os

import numpy as np
import pytest
import torch

pytest.importorskip("llmcompressor")
pytest.importorskip("gguf")

from helpers import dataset, oneshot, tiny_model
from real_llama import PROGRAMS, QUANTIZE

from moeq_plugin.core.allocation import BitBudget, allocate_bits
from moeq_plugin.integrations.llama_cpp import ggml
from moeq_plugin.integrations.llama_cpp.sensitivity import TypeSensitivityModifier
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity_config import SensitivityConfig

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not QUANTIZE.exists(), reason="no llama.cpp: run `make llama` first"),
]


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    monkeypatch.setenv("PATH", f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}")


def table_of(model, *options, **settings):
    modifier = TypeSensitivityModifier(options=list(options), **settings)
    oneshot(model, modifier)
    return modifier.table


def test_losses_fall_with_bits_and_what_does_not_fit_cannot_be_chosen(tmp_path):
    options = ("Q4_0", "Q5_0", "Q8_0", "Q4_K")  # the last has blocks of 256 columns
    table = table_of(tiny_model("qwen3_moe", tmp_path), *options)
    assert table.options == options
    four, five, eight, wide = np.moveaxis(table.loss[0], 1, 0)
    assert (four > five).mean() > 0.9 and (five > eight).all() and (eight > 0).all()
    assert np.isinf(wide).all()
    budget = BitBudget(bits_per_weight=16)
    assert set(allocate_bits(table, budget, target="gguf").choice.values()) == {"Q8_0"}


def test_bytes_are_those_that_llama_cpp_stores(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    table = table_of(model, "Q4_1", "Q8_0")
    for name, num_bytes in zip(table.rows, table.num_bytes, strict=True):
        weight = model.get_submodule(name).weight.detach().numpy()
        stored = [ggml.quantize(weight, option, None).nbytes for option in table.options]
        assert num_bytes.tolist() == stored


def test_a_loss_is_half_the_squared_change_of_what_a_linear_puts_out(tmp_path):
    """Of q, whose tokens all count alike: without gradients, relative to what o puts out."""
    config = SensitivityConfig(gradient=False)
    table = table_of(tiny_model("qwen3_moe", tmp_path), "Q4_0", "Q8_0", config=config)
    model = tiny_model("qwen3_moe", tmp_path / "again")
    attention, inputs, outputs = model.model.layers[0].self_attn, [], []
    attention.q_proj.register_forward_pre_hook(lambda _m, args: inputs.append(args[0][0]))
    attention.o_proj.register_forward_hook(lambda _m, _args, out: outputs.append(out[0]))
    for row in dataset()["input_ids"]:
        model(torch.tensor([row]))
    halves = [[x.double() for x in inputs[start::2]] for start in (0, 1)]
    rounding, judging = (torch.cat(half).detach() for half in halves)
    energy = torch.cat(outputs[1::2]).double().square().sum(1).mean()
    pool = [attention.q_proj]
    assert pool and rounding.shape == judging.shape
    columns = rounding.square().mean(0).float().numpy()
    weight = attention.q_proj.weight.detach()
    for index, option in enumerate(table.options):
        rounded = ggml.dequantize(ggml.quantize(weight.numpy(), option, columns), option)
        change = judging @ (torch.from_numpy(rounded) - weight).double().T
        before = judging @ weight.double().T
        expected = change.square().sum(1).mean() / before.square().sum(1).mean() * energy / 2
        row = table.rows.index("model.layers.0.self_attn.q_proj")
        assert table.loss[0, row, index] == pytest.approx(expected.item(), rel=0.02)
