"""llm-compressor quantizes every linear of an RWKV, layer by layer, and the result loads again."""

import pytest
import torch
from helpers import VOCABULARY, int4, oneshot, tokens
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.pipelines.sequential.helpers import trace_subgraphs
from rwkv_models import VERSIONS, tiny_rwkv
from torch import nn
from transformers import AutoModelForCausalLM, RwkvConfig, RwkvForCausalLM

from moeq_plugin.rwkv import disable_rescaling, guard_initialization

RANKS = {
    "rwkv6": {"maa_low_rank_dim": 32, "decay_low_rank_dim": 32},
    "rwkv7": {f"{name}_low_rank_dim": 32 for name in ("decay", "a", "v", "gate")},
}
NUM_LINEARS = {"rwkv6": 3 * 16, "rwkv7": 3 * 14 - 2}


@pytest.fixture(params=VERSIONS)
def version(request):
    return request.param


def saved_and_loaded(model, directory):
    model.save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def quantized_names(model):
    return {n for n, m in model.named_modules() if hasattr(m, "quantization_scheme")}


@pytest.mark.parametrize("masked", [False, True], ids=["ids", "ids-and-mask"])
@torch.no_grad()
def test_a_model_is_traced_layer_by_layer(version, masked):
    model = tiny_rwkv(version)
    inputs = {"input_ids": tokens(2, 40) % 61}
    if masked:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    subgraphs = trace_subgraphs(model, inputs, model._no_split_modules, ignore=[])
    values = dict(inputs)
    for subgraph in subgraphs[:-1]:
        values |= subgraph.forward(model, **{name: values[name] for name in subgraph.input_names})
    last = subgraphs[-1]
    output = last.forward(model, **{name: values[name] for name in last.input_names})

    assert len(subgraphs) == 1 + model.config.num_hidden_layers
    torch.testing.assert_close(output["logits"], logits(model, inputs["input_ids"]))


def test_every_linear_is_quantized_and_loads_again(version, tmp_path):
    model = tiny_rwkv(version, vocab_size=VOCABULARY, **RANKS[version])
    model = saved_and_loaded(model, tmp_path / "original")
    ids = tokens(2, 40)
    before = logits(model, ids)

    recipe = GPTQModifier(config_groups=int4(), ignore=["lm_head"])
    oneshot(model, recipe, output_dir=tmp_path / "quantized", pipeline="sequential")

    after = logits(model, ids)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert quantized_names(model) == linears
    assert len(linears) == NUM_LINEARS[version]
    assert 0 < (after - before).std() < before.std()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.float32)
    assert torch.equal(logits(reloaded, ids), after)


def test_the_w4a16_preset_fits_sizes_that_are_multiples_of_128(tmp_path):
    ranks = dict.fromkeys(RANKS["rwkv7"], 128)
    model = tiny_rwkv("rwkv7", vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, **ranks)
    model = saved_and_loaded(model, tmp_path / "original")

    oneshot(model, GPTQModifier(scheme="W4A16", ignore=["lm_head"]), pipeline="sequential")

    assert len(quantized_names(model)) == 2 * 14 - 2


def tiny_rwkv4(directory, **changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3}
    model = RwkvForCausalLM(RwkvConfig(**sizes, context_length=64, **changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.15)
    return saved_and_loaded(model, directory)


def test_rwkv_4_loads_again(tmp_path):
    model = tiny_rwkv4(tmp_path / "original", rescale_every=1)
    ids = tokens(2, 40)
    before = logits(tiny_rwkv4(tmp_path / "copy", rescale_every=0), ids)

    disable_rescaling(model)
    recipe = GPTQModifier(config_groups=int4(), ignore=["head"])
    oneshot(model, recipe, output_dir=tmp_path / "quantized")

    after = logits(model, ids)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.float32)
    assert len(quantized_names(model)) == 3 * 7
    assert (after - before).std() < 0.5 * before.std()
    disable_rescaling(reloaded)  # the host saves the configuration that it found, not the model's
    assert torch.equal(logits(reloaded, ids), after)


def test_rescaling_is_undone_exactly(tmp_path):
    model = tiny_rwkv4(tmp_path / "original", rescale_every=1)
    unscaled = tiny_rwkv4(tmp_path / "copy", rescale_every=0)
    ids = tokens(2, 20)
    assert not torch.equal(logits(model, ids), logits(unscaled, ids))

    disable_rescaling(model)

    assert not model.training
    assert torch.equal(logits(model, ids), logits(unscaled, ids))


def test_the_guard_is_put_on_once_and_skips_only_linears_without_weight():
    initialized = []

    class Model:
        def _init_weights(self, module):
            initialized.append(module)

    guard_initialization(Model)
    once = Model._init_weights
    guard_initialization(Model)
    assert Model._init_weights is once

    compressed = nn.Linear(2, 2)
    del compressed.weight
    modules = [nn.Linear(2, 2), compressed, nn.Embedding(2, 2), nn.ReLU()]
    for module in modules:
        Model()._init_weights(module)
    assert initialized == [modules[0], *modules[2:]]
