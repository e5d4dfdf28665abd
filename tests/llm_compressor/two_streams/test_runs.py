"""Runs with a corrected target: what changes, what does not, and what says that it cannot be."""

from copy import deepcopy

import pytest
import torch
from helpers import NoProcessor, dataset, int4, oneshot, tiny_model
from tiny_rwkv import tiny_rwkv

pytest.importorskip("llmcompressor")

from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from moeq_plugin import MoEQuantModifier
from moeq_plugin.integrations.llm_compressor import RWKVQuantModifier
from moeq_plugin.integrations.llm_compressor.moequant import request
from moeq_plugin.integrations.llm_compressor.two_streams.streams import TwoStreams
from moeq_plugin.records.run import Basis, RunRecord

CORRECTED = {"config_groups": int4(16, num_bits=3), "corrected_target": True}
QKV = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]


def run(directory, family="qwen3_moe", recipe=None, data=None, host=None, **settings):
    """Return the recipe and the model after a run."""
    model = tiny_model(family, directory / "model")
    recipe = MoEQuantModifier(**{**CORRECTED, **settings}) if recipe is None else recipe
    oneshot(model, recipe, data, **(host or {}))
    return recipe, model


def test_where_the_streams_are_equal_nothing_changes(tmp_path):
    """The first layer's attention receives what it does in 16 bit: alike, bit by bit."""
    models = [run(tmp_path, corrected_target=asked)[1].state_dict() for asked in (False, True)]
    for name in QKV:
        assert torch.equal(*(model[name] for model in models)), name
    later = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(*(model[later] for model in models))


def test_twice_the_same_is_the_same(tmp_path):
    models = [run(tmp_path)[1].state_dict() for _ in range(2)]
    for name, tensor in models[0].items():
        assert torch.equal(models[1][name], tensor), name


def starved_model(directory):
    """Return a model of whose eight experts the last is never routed to, the first three hardly.

    Of two opposite logits one is above the zero of the last, and there are two such pairs.
    """
    model = tiny_model("qwen3_moe", directory, num_experts=8)
    with torch.no_grad():
        for layer in model.model.layers:
            gate = layer.mlp.gate.weight
            gate[:3] *= 0.3
            gate[3:7] *= 3
            gate[4], gate[6], gate[7] = -gate[3], -gate[5], 0
    return model


def test_starved_experts_stay_close_to_their_weights(tmp_path, monkeypatch):
    """And on the tokens that were observed no linear is further from the 16-bit stream."""
    changes, correct = [], request.correct

    def spy(observation, hessian, basis, **settings):
        before = [linear.weight.detach().double() for linear in observation.linears]
        correct(observation, hessian, basis, **settings)
        moments = observation.moments
        H, cross, residual = (
            tensor.double() for tensor in (moments.hessian, moments.cross, moments.residual)
        )
        for linear, weight in zip(observation.linears, before, strict=True):
            change = linear.weight.detach().double() - weight
            wanted = weight @ cross + (residual if len(residual) else 0)
            # of sum a |change x - y|^2, what depends on the change
            gain = (change @ H * change).sum() / 2 - (change * wanted).sum()
            changes.append((basis, moments.effective_tokens, gain, change.norm() / weight.norm()))

    monkeypatch.setattr(request, "correct", spy)
    recipe = MoEQuantModifier(**CORRECTED)
    model = starved_model(tmp_path)
    oneshot(model, recipe, dataset(4, 24))
    bases = {basis for basis, *_ in changes}
    assert {Basis.SHRUNK, Basis.LAYER} <= bases
    assert min(tokens for _, tokens, *_ in changes) == 0
    for basis, tokens, gain, size in changes:
        assert gain <= 1e-6, (basis, tokens)
        assert size < 0.5, (basis, tokens)
        if basis is Basis.LAYER:
            assert size == 0
        if basis is Basis.SHRUNK and tokens < 4:
            assert size < 0.1
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_less_is_lost(tmp_path):
    """On the calibration set of a random model, which is where it is chosen to lose less."""
    data = dataset(32, 32)
    ids = torch.tensor(data["input_ids"])
    before = tiny_model("qwen3_moe", tmp_path / "model")
    losses = []
    with torch.no_grad():
        reference = before(ids).logits.log_softmax(-1)
        for asked in (False, True):
            _, after = run(tmp_path, data=data, corrected_target=asked)
            found = after(ids).logits.log_softmax(-1)
            losses.append((reference.exp() * (reference - found)).sum(-1).mean())
    assert losses[1] < 0.95 * losses[0]


def test_a_layer_that_adds_otherwise_is_solved_without(tmp_path, monkeypatch):
    """Granite multiplies what it adds: the residual stream is then not what is made up for."""
    forward = Qwen3MoeDecoderLayer.forward

    def doubled(self, hidden_states, *arguments, **others):
        after = forward(self, hidden_states, *arguments, **others)
        return hidden_states + 2 * (after - hidden_states) if self.is_second else after

    model = tiny_model("qwen3_moe", tmp_path / "model", num_hidden_layers=3)
    for index, layer in enumerate(model.model.layers):
        layer.is_second = index == 1
    monkeypatch.setattr(Qwen3MoeDecoderLayer, "forward", doubled)
    recipe = MoEQuantModifier(**CORRECTED)
    oneshot(model, recipe, output_dir=str(tmp_path / "out"))
    assert len(recipe.record.linears) == 3 * (4 + 4 * 3)
    (record,) = RunRecord.load(tmp_path / "out")
    assert record.uncorrected == {
        "model.layers.1": "the output of its MLP is not added to the residual stream as it is",
        "model.layers.2": "follows model.layers.1",
    }


def test_what_was_quantized_before_leaves_no_16_bit_stream(tmp_path):
    first = QuantizationModifier(scheme="FP8_DYNAMIC", targets=["re:.*self_attn.*"])
    second = MoEQuantModifier(**CORRECTED, ignore=["re:.*self_attn.*", "lm_head"])
    run(tmp_path, recipe=[first, second])
    assert "was quantized before" in second.record.uncorrected["model"]
    assert len(second.record.linears) == 2 * 4 * 3


@pytest.mark.parametrize("kind", ["gemma2", "rwkv"])
def test_a_model_of_another_build_is_solved_without_and_says_so(kind, tmp_path):
    warnings = []
    handler = logger.add(warnings.append, level="WARNING")
    if kind == "rwkv":
        model = tiny_rwkv(tmp_path / "model")
        recipe = RWKVQuantModifier(config_groups=int4(None), corrected_target=True)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
        config = AutoConfig.for_model("gemma2", vocab_size=128, **sizes, **heads)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        recipe = MoEQuantModifier(**CORRECTED)
    oneshot(model, recipe)
    logger.remove(handler)
    assert list(recipe.record.uncorrected) == ["model"]
    assert any("no corrected target" in str(warning) for warning in warnings)


def test_dense_models_are_corrected_too(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama", vocab_size=128, num_attention_heads=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    recipe = MoEQuantModifier(**CORRECTED)
    oneshot(model, recipe)
    assert recipe.record.uncorrected == {}
    assert len(recipe.record.linears) == 2 * 7


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"pipeline": "basic"}, "pipeline='basic'"),
        ({"sequential_targets_per_subgraph": 2}, "sequential_targets_per_subgraph=2"),
        ({"sequential_targets": ["Qwen3MoeAttention", "Qwen3MoeSparseMoeBlock"]}, "Attention"),
    ],
    ids=["pipeline", "two at once", "parts"],
)
def test_passes_that_do_not_finish_layers_one_by_one_are_refused(arguments, named, tmp_path):
    model = tiny_model("qwen3_moe", tmp_path / "model")
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="corrected_target rounds decoder layers") as error:
        oneshot(model, MoEQuantModifier(**CORRECTED), **arguments)
    assert named in str(error.value)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if name in after)


def test_static_activation_scales_are_calibrated_beside_it(tmp_path):
    """Their observers need all tokens in the host's pass; pairs are of routed ones all the same."""
    groups = int4(None, num_bits=8)
    groups["group_0"]["input_activations"] = {"num_bits": 8, "strategy": "tensor", "dynamic": False}
    recipe, model = run(tmp_path, config_groups=groups)
    assert recipe.record.uncorrected == {}
    scales = [t for name, t in model.state_dict().items() if name.endswith("input_scale")]
    assert scales
    assert all(scale.isfinite().all() for scale in scales)
    weighted = [of for of in recipe.record.linears if ".experts." in of.name]
    assert all(of.effective_tokens < 8 * 32 for of in weighted)


def test_without_propagated_errors_layers_begin_with_equal_streams(tmp_path):
    host = {"propagate_error": False}
    models = [
        run(tmp_path, corrected_target=asked, host=host)[1].state_dict() for asked in (False, True)
    ]
    for name in [*QKV, *(name.replace("layers.0", "layers.1") for name in QKV)]:
        assert torch.equal(*(model[name] for model in models)), name


def test_one_layer_at_a_time_is_kept(tmp_path, monkeypatch):
    """Else the hidden states of the calibration set would stay once for every layer."""
    held, leave = [], TwoStreams.leave

    def spy(self, modules):
        leave(self, modules)
        held.append([len(calls) for calls in self._calls.values()])

    monkeypatch.setattr(TwoStreams, "leave", spy)
    run(tmp_path)
    assert len(held) > 2
    assert not any(map(any, held)), held


def test_text_that_the_model_writes_itself_will_do(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path / "model")
    recipe = MoEQuantModifier(**CORRECTED, ebss={"num_sequences": 6, "seq_len": 16})
    from llmcompressor import oneshot as host

    host(model=model, recipe=recipe, processor=NoProcessor())
    assert recipe.record.uncorrected == {}
    assert len(recipe.record.linears) == 2 * (4 + 4 * 3)
