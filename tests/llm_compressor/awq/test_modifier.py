"""MoEQuantAWQModifier inside the host's real oneshot flow."""

import json

import pytest
import torch
import yaml
from helpers import FAMILIES, dataset, int4, oneshot, tiny_model, tokens

pytest.importorskip("llmcompressor")

from compressed_tensors.quantization import disable_quantization
from datasets import Dataset
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moeq_plugin import MoEQuantAWQModifier, MoEQuantModifier
from moeq_plugin.integrations.llm_compressor.checkpoint.loading import load_dequantized
from moeq_plugin.models.moe import find_moe_layers
from moeq_plugin.records.run import Basis, RunRecord

KEPT = ["lm_head", "re:.*gate$", "re:.*router$"]


def uneven_model(family, directory, **changes):
    """Make a tiny model whose channels differ in size, as those of trained models do."""
    model = tiny_model(family, directory, **changes)
    rng = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data *= torch.exp(torch.randn(parameter.shape, generator=rng))
    return model


def rounding(*, symmetric=True):
    return QuantizationModifier(config_groups=int4(16, symmetric=symmetric), ignore=KEPT)


def smooth(model, data=None, *, symmetric=True, pipeline="independent", **arguments):
    """Smooth ``model`` for 4 bits and leave its weights unrounded; return the modifier's record."""
    modifier = Spy(**{"n_grid": 5, **arguments})
    recipe = [modifier, rounding(symmetric=symmetric)]
    oneshot(model, recipe, data, pipeline=pipeline)
    model.apply(disable_quantization)
    return modifier._record


def starve(model, allowed):
    """Make every router of ``model`` choose among the experts in ``allowed`` only."""
    for layer in find_moe_layers(model):

        def reroute(_module, _args, output, layer=layer):
            logits, weights, index = output
            return logits, weights, torch.tensor(allowed)[index % len(allowed)]

        layer.router.register_forward_hook(reroute)


class Spy(MoEQuantAWQModifier):
    """Keeps what the experts of the first MoE layer are called with, before anything is scaled.

    From within: traced by the host, the model can lose its causal mask and route differently.
    """

    def on_calibration_start(self, state, event, **kwargs):
        super().on_calibration_start(state, event, **kwargs)
        calls.clear()
        (layer, *_) = self._layers
        self.register_hook(layer.experts, lambda _m, args: calls.append(args[:3]), "forward_pre")


calls: list[tuple[torch.Tensor, ...]] = []


@torch.no_grad()
def inputs_of(expert, index, projection, *, factors=1.0, all_tokens=False):
    """Return what a linear of an expert receives and its combine weights, in float64.

    ``factors`` [hidden] is what smoothing the norm has done to the experts' inputs since.
    """
    rows, weights = [], []
    for hidden, of_slots, combine in calls:
        for token, experts in enumerate(of_slots.tolist()):
            if all_tokens or index in experts:
                rows.append(hidden[token] * factors)
                weights.append(1.0 if all_tokens else combine[token, experts.index(index)].item())
    rows = torch.stack(rows)
    if projection == "down_proj":
        rows = torch.nn.functional.silu(expert.gate_proj(rows)) * expert.up_proj(rows)
    return rows.double(), torch.tensor(weights, dtype=torch.float64)


def candidates(down, rows, magnitude):
    """Yield the scales that a search of 20 steps tries, and what each changes."""
    for step in range(20):
        scales = magnitude.float() ** (step / 19)
        scales = scales / (scales.max() * scales.min()).sqrt()
        yield scales, rounded(down * scales) / scales - down


def rounded(weight, group_size=16):
    """Round to nearest on the 4-bit asymmetric grid; the ends of the symmetric one are ties."""
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high.clamp(min=0) - low.clamp(max=0)) / 15
    zero = (-8 - low.clamp(max=0) / scale).round()
    return (((groups / scale + zero).round().clamp(-8, 7) - zero) * scale).flatten(1)


def weighted_loss(change, inputs, token_weights):
    return (token_weights * (inputs @ change.double().T).square().sum(1)).sum().item()


@pytest.fixture(scope="module", params=FAMILIES)
def smoothed(request, tmp_path_factory):
    """Return a family's name, its model as it was, smoothed, and the record of that."""
    directory = tmp_path_factory.mktemp(request.param)
    original, model = (uneven_model(request.param, directory) for _ in range(2))
    return request.param, original, model, smooth(model)


def test_smoothing_leaves_the_model_as_it_was(smoothed):
    _, original, model, record = smoothed

    ids = tokens(2, 32, seed=3)
    ours, theirs = model(ids).logits, original(ids).logits
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    assert any(of["loss"] < of["loss_unscaled"] for of in record.smoothed.values())
    for norm in ("input_layernorm", "post_attention_layernorm"):
        names = [f"model.layers.{index}.{norm}" for index in range(2)]
        before, after = ([m.get_submodule(n).weight for n in names] for m in (original, model))
        assert set(names) <= set(record.smoothed)
        assert any((a / b - 1).abs().max() > 0.01 for a, b in zip(after, before, strict=True))


def test_what_a_block_reads_is_judged_whole_and_an_experts_linear_alone(smoothed):
    family, _, model, record = smoothed

    (layer, *_) = find_moe_layers(model)
    norm = layer.name.replace("mlp", "post_attention_layernorm")
    assert record.smoothed[norm]["judged by"] == layer.name
    assert not record.smoothed[norm]["weighted"]
    for e in range(layer.num_experts):
        name = f"{layer.name}.experts.{e}.up_proj"
        if family == "gpt_oss":
            assert "a clamp, an offset or a nonlinearity" in record.left_out[name]
        else:
            assert record.smoothed[name]["judged by"] == name.replace("up_proj", "down_proj")
            assert record.smoothed[name]["weighted"]
    shared = [of for name, of in record.smoothed.items() if "shared_expert" in name]
    assert [of["weighted"] for of in shared] == {
        "qwen2_moe": [True, True], "deepseek_v2": [False], "deepseek_v3": [False],
    }.get(family, [])  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss"])
def test_values_are_scaled_where_heads_are_not_grouped(family, tmp_path):
    grouped = smooth(tiny_model(family, tmp_path / "grouped"))
    model, original = (
        tiny_model(family, tmp_path / "each", num_key_value_heads=4) for _ in range(2)
    )
    each = smooth(model)

    assert "grouped-query attention" in grouped.left_out["model.layers.0.self_attn.v_proj"]
    assert "model.layers.0.self_attn.v_proj" in each.smoothed
    ids = tokens(2, 32, seed=3)
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)


class Recording(AWQModifier):
    """The host's modifier, telling what it found."""

    def _compute_best_scale(self, mapping, *args):
        scales = super()._compute_best_scale(mapping, *args)
        found[mapping.smooth_name] = self._error_metrics[-1] | {"scales": scales}
        return scales


found: dict[str, dict] = {}


@pytest.mark.parametrize("duo_scaling", [True, False, "both"])
def test_with_every_weight_one_the_hosts_scales_are_chosen(duo_scaling, tmp_path, monkeypatch):
    """B1. Of the host's mappings those of Qwen3-MoE are all that reads a norm."""
    monkeypatch.setattr(IntermediatesCache, "pin_memory", lambda *_: None)  # needs a GPU
    found.clear()
    ours, theirs = (tiny_model("qwen3_moe", tmp_path, num_hidden_layers=1) for _ in range(2))

    # a power of 0 makes every combine weight 1
    record = smooth(
        ours, affinity_power=0, min_effective_tokens=0, n_grid=10, duo_scaling=duo_scaling
    )
    host = Recording(n_grid=10, duo_scaling=duo_scaling, offload_device=None)
    oneshot(theirs, [host, rounding()], moe_calibrate_all_experts=False)

    assert record.smoothed.keys() == found.keys()
    assert len(found) == 2 + 4
    for name, of in record.smoothed.items():
        assert of["loss"] == pytest.approx(found[name]["best_error"], rel=1e-4)
        assert of["loss_unscaled"] == pytest.approx(found[name]["initial_error"], rel=1e-4)
    assert any((of["scales"] - 1).abs().max() > 0.01 for of in found.values())
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if "scale" not in name:
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-6)


SEARCH = {"n_grid": 20, "duo_scaling": False, "symmetric": False}


def linearized(*arguments, **changes):
    model = tiny_model(*arguments, **changes)
    oneshot(model, rounding())
    return model.apply(disable_quantization)


@pytest.mark.parametrize("power", [1.0, 8.0])
def test_the_scales_of_an_expert_are_the_brute_force_optimum(power, tmp_path):
    """B2. All twenty scales, every token with its weight, in float64."""
    model = tiny_model("qwen3_moe", tmp_path, num_hidden_layers=1)
    original = linearized("qwen3_moe", tmp_path, num_hidden_layers=1)

    record = smooth(model, dataset(16, 32), affinity_power=power, min_effective_tokens=0, **SEARCH)

    chosen_otherwise = 0
    for e in range(4):
        expert = original.model.layers[0].mlp.experts[e]
        down = expert.down_proj.weight.detach()
        rows, weights = inputs_of(expert, e, "down_proj")
        tried = [
            (weighted_loss(change, rows, weights**power), weighted_loss(change, rows, 1), scales)
            for scales, change in candidates(down, rows, rows.abs().mean(0))
        ]
        least, _, best = min(tried, key=lambda x: x[0])
        _, _, unweighted_best = min(tried, key=lambda x: x[1])

        smoothed = model.model.layers[0].mlp.experts[e].down_proj.weight.detach()
        torch.testing.assert_close(smoothed, down * best, rtol=1e-3, atol=1e-6)
        of = record.smoothed[f"model.layers.0.mlp.experts.{e}.up_proj"]
        mean = least / (weights**power).sum().item() / len(down)
        assert of["loss"] == pytest.approx(mean, rel=1e-3)
        chosen_otherwise += not torch.allclose(best, unweighted_best)
    assert chosen_otherwise >= (power == 8.0)  # or the weights would not have been tested


@pytest.mark.parametrize("family", FAMILIES)
def test_no_power_changes_what_is_judged_by_a_whole_block(family, tmp_path):
    """B3. There the combine weights act already."""
    # the last layer only: before it, layers with other scales differ in the last bits
    depth = 2 if "deepseek" in family else 1
    first, second = (tiny_model(family, tmp_path, num_hidden_layers=depth) for _ in range(2))

    first_record = smooth(first, affinity_power=0, min_effective_tokens=0)
    second_record = smooth(second, affinity_power=8, min_effective_tokens=0)

    last = f"model.layers.{depth - 1}"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        ours, theirs = (m.get_submodule(f"{last}.{norm}").weight for m in (first, second))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    losses = [
        {n: of["loss"] for n, of in r.smoothed.items()} for r in (first_record, second_record)
    ]
    assert losses[0][f"{last}.post_attention_layernorm"] == pytest.approx(
        losses[1][f"{last}.post_attention_layernorm"], rel=1e-4
    )
    weighted = [n for n, of in second_record.smoothed.items() if of["weighted"]]
    assert bool(weighted) == (family != "gpt_oss")
    differ = [losses[0][n] != pytest.approx(losses[1][n], rel=1e-2) for n in weighted]
    assert sum(differ) >= len(differ) / 2  # an expert that all tokens weight alike may not differ


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_starved_expert_is_named_and_unharmed(family, tmp_path):
    model, original = (tiny_model(family, tmp_path) for _ in range(2))
    starve(model, [0, 1])
    starve(original, [0, 1])
    said = []
    sink = logger.add(said.append, format="{message}", level="WARNING")

    record = smooth(model, clip=True)

    logger.remove(sink)
    starved = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(2) for e in (2, 3)]
    for name in starved:
        assert record.smoothed[name]["basis"] is Basis.LAYER
        assert record.smoothed[name]["effective_tokens"] == 0
        assert any(name in line for line in said)
        expert = model.get_submodule(name.rpartition(".")[0])
        # each weight still does something: clamping moves outliers, it zeroes nothing
        weights = [p for n, p in expert.named_parameters() if n.endswith(".weight")]
        assert all((weight != 0).all() and weight.isfinite().all() for weight in weights)
    assert f"{len(starved)} on the layer's alone" in record.summary(0)


def test_a_starved_expert_gets_what_all_tokens_of_its_layer_would_give(tmp_path):
    model = tiny_model("mixtral", tmp_path, num_hidden_layers=1)
    expert = linearized("mixtral", tmp_path, num_hidden_layers=1).model.layers[0].mlp.experts[2]
    starve(model, [0, 1])

    record = smooth(model, **SEARCH)

    down = expert.down_proj.weight.detach()
    rows, ones = inputs_of(expert, 2, "down_proj", all_tokens=True)
    rms = rows.square().mean(0).sqrt()
    least, best = min(
        ((weighted_loss(change, rows, ones), scales) for scales, change in
         candidates(down, rows, rms)), key=lambda x: x[0],
    )  # fmt: skip
    smoothed = model.model.layers[0].mlp.experts[2].down_proj.weight.detach()
    torch.testing.assert_close(smoothed, down * best, rtol=1e-3, atol=1e-6)
    of = record.smoothed["model.layers.0.mlp.experts.2.up_proj"]
    assert of["loss"] == pytest.approx(least / len(down) / len(rows), rel=1e-3)


def test_one_token_is_mixed_with_the_layer(tmp_path):
    model = tiny_model("mixtral", tmp_path)
    record = smooth(model, Dataset.from_dict({"input_ids": [[5]]}))
    bases = [of["basis"] for name, of in record.smoothed.items() if "experts" in name]
    assert bases.count(Basis.SHRUNK) == bases.count(Basis.LAYER) == 2 * 2


def test_a_batch_that_is_all_padding_changes_nothing(tmp_path):
    model, original = (tiny_model("qwen3_moe", tmp_path) for _ in range(2))
    data = Dataset.from_dict({"input_ids": [[1] * 8], "attention_mask": [[0] * 8]})

    record = smooth(model, data, clip=True)

    ids = tokens(1, 16)
    torch.testing.assert_close(model(ids).logits, original(ids).logits)
    assert not record.smoothed and not record.clipped
    assert "no token reached it" in record.left_out.values()


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_padding_counts_nowhere(pipeline, tmp_path):
    model, unpadded = (tiny_model("qwen2_moe", tmp_path, num_hidden_layers=1) for _ in range(2))
    rows = tokens(6, 20).tolist()
    fill = [7] * 12  # a token that does occur
    data = Dataset.from_dict(
        {
            "input_ids": [row + fill for row in rows],
            "attention_mask": [[1] * len(row) + [0] * len(fill) for row in rows],
        }
    )

    first = smooth(model, data, clip=True, pipeline=pipeline)
    second = smooth(unpadded, Dataset.from_dict({"input_ids": rows}), clip=True, pipeline=pipeline)

    assert first.smoothed.keys() == second.smoothed.keys()
    for name, of in first.smoothed.items():
        assert of["loss"] == pytest.approx(second.smoothed[name]["loss"], rel=1e-3)
    for name, share in first.clipped.items():
        assert share == pytest.approx(second.clipped[name], rel=1e-2)


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_clipping_lowers_the_weighted_loss_that_it_records(projection, tmp_path):
    plain, clipped = (uneven_model("qwen3_moe", tmp_path, num_hidden_layers=1) for _ in range(2))
    norm = "model.layers.0.post_attention_layernorm"
    before = plain.get_submodule(norm).weight.detach().clone()
    arguments = {"affinity_power": 4, "min_effective_tokens": 0, "symmetric": False}

    smooth(plain, dataset(16, 32), **arguments)
    record = smooth(clipped, dataset(16, 32), clip=True, **arguments)

    factors = plain.get_submodule(norm).weight.detach() / before
    assert (factors - 1).abs().max() > 0.1
    shares = []
    for e in range(4):
        name = f"model.layers.0.mlp.experts.{e}"
        rows, weights = inputs_of(plain.get_submodule(name), e, projection, factors=factors)
        ours, theirs = (
            m.get_submodule(f"{name}.{projection}").weight.detach() for m in (clipped, plain)
        )
        losses = [weighted_loss(rounded(w) - theirs, rows, weights**4) for w in (ours, theirs)]
        shares.append(losses[0] / losses[1])
        assert record.clipped[f"{name}.{projection}"] == pytest.approx(shares[-1], rel=1e-2)
    assert max(shares) <= 1.001 and min(shares) < 0.95


def test_queries_and_keys_are_not_clipped(tmp_path):
    record = smooth(tiny_model("deepseek_v3", tmp_path), clip=True)
    clipped = {name.rpartition(".")[2] for name in record.clipped}
    assert clipped == {"gate_proj", "up_proj", "down_proj", "o_proj"}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_reloads_with_the_same_logits(family, tmp_path):
    model = tiny_model(family, tmp_path / "model")
    recipe = [MoEQuantAWQModifier(n_grid=5, clip=True), rounding()]
    oneshot(model, recipe)
    ids = tokens(2, 16, seed=5)
    expected = model(ids).logits

    model.save_pretrained(tmp_path / "out")

    if family == "gpt_oss":  # transformers has no rule to read its experts
        loaded = load_dequantized(tmp_path / "out")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    (record,) = RunRecord.load(tmp_path / "out")
    assert record == recipe[0]._record
    assert record.smoothed
    assert record.settings["clip"] is True


def test_before_gptq_both_are_recorded(tmp_path):
    model = tiny_model("mixtral", tmp_path / "model")
    recipe = [MoEQuantAWQModifier(n_grid=5), MoEQuantModifier(config_groups=int4(16))]

    oneshot(model, recipe, output_dir=str(tmp_path / "out"))

    runs = json.loads((tmp_path / "out" / "moeq_run.json").read_text())["runs"]
    assert {run["modifier"]: len(run["linears"]) for run in runs} == {
        "MoEQuantAWQModifier": 0,
        "MoEQuantModifier": 2 * (4 + 4 * 3),
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = tokens(2, 16, seed=5)
    difference = (loaded(ids).logits - original(ids).logits).norm() / original(ids).logits.norm()
    assert difference < 0.5  # random experts would give 1


RECIPE = """
quant_stage:
  quant_modifiers:
    MoEQuantAWQModifier: {clip: true, n_grid: 5}
    QuantizationModifier:
      ignore: [lm_head]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 16}
"""


def test_a_yaml_recipe_and_its_copy_beside_the_checkpoint_give_one_result(tmp_path):
    first, second = (tiny_model("qwen3_moe", tmp_path / "model") for _ in range(2))

    oneshot(first, RECIPE, output_dir=str(tmp_path / "out"))
    written = (tmp_path / "out" / "recipe.yaml").read_text()
    oneshot(second, written)

    assert "MoEQuantAWQModifier" in yaml.safe_load(written)["quant_stage"]["quant_modifiers"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = tokens(1, 16)
    torch.testing.assert_close(loaded(ids).logits, second(ids).logits, rtol=1e-4, atol=1e-4)


def test_given_mappings_are_used(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path)
    mapping = AWQMapping("re:.*up_proj$", ["re:.*down_proj$"])
    record = smooth(model, mappings=[mapping])
    assert len(record.smoothed) == 2 * 4
    assert all(of["weighted"] for of in record.smoothed.values())


class TestRefuses:
    def test_a_dense_model(self, tmp_path):
        config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                             num_attention_heads=2, vocab_size=128)  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="no MoE layers, so there is no router"):
            smooth(model)

    def test_no_calibration_data(self, tmp_path):
        from helpers import NoProcessor
        from llmcompressor import oneshot as host

        model = tiny_model("qwen3_moe", tmp_path)
        with pytest.raises(ValueError, match="needs calibration data, got none"):
            host(model=model, recipe=[MoEQuantAWQModifier(), rounding()], processor=NoProcessor())

    def test_a_loss_mask(self, tmp_path):
        data = dataset().add_column("loss_mask", [[1] * 32] * 8)
        with pytest.raises(ValueError, match="cannot align use_loss_mask"):
            oneshot(
                tiny_model("qwen3_moe", tmp_path),
                [MoEQuantAWQModifier(), rounding()],
                data,
                use_loss_mask=True,
            )

    def test_coming_after_the_quantizer(self, tmp_path):
        recipe = [rounding(), MoEQuantAWQModifier(), rounding()]  # the host refuses two of them
        with pytest.raises(ValueError, match="put it before the modifier that quantizes"):
            oneshot(tiny_model("qwen3_moe", tmp_path), recipe)

    @pytest.mark.parametrize("later", ["router", "allocated"])
    def test_nothing_that_has_a_scheme_yet(self, later, tmp_path):
        groups = int4(16)
        groups["group_0"]["targets"] = ["lm_head"]
        options = ["W3A16_G16", "W4A16_G16"]
        quantizer = {
            "router": QuantizationModifier(config_groups=groups),
            "allocated": MoEQuantModifier(bits_per_weight=5.5, options=options),
        }[later]
        with pytest.raises(ValueError, match="quantizes nothing that scales could be moved into"):
            oneshot(tiny_model("qwen3_moe", tmp_path), [MoEQuantAWQModifier(), quantizer])

    def test_a_mapping_that_sums_within_an_expert(self, tmp_path):
        mapping = AWQMapping("re:.*post_attention_layernorm$",
                             ["re:.*experts.0.gate_proj$", "re:.*experts.0.up_proj$"])  # fmt: skip
        with pytest.raises(ValueError, match="tokens count alike that the router weights"):
            smooth(tiny_model("qwen3_moe", tmp_path), mappings=[mapping])
