"""RWKVQuantModifier in the host: who gets what, what it is fitted to, and what the record says."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from helpers import dataset, int4, oneshot, tiny_model
from tiny_rwkv import ELEMENTWISE, FORM, SIZES, tiny_rwkv

pytest.importorskip("llmcompressor")

from llmcompressor.recipe import Recipe
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import moeq_plugin.integrations.hf  # noqa: F401
from moeq_plugin import RWKVQuantModifier
from moeq_plugin.core.channel_power import ChannelPower
from moeq_plugin.core.codebook import CodebookFormat, encode
from moeq_plugin.core.codebook_solver import solve_codebook
from moeq_plugin.core.hessian import SecondMoments
from moeq_plugin.core.hybrid import choose_scalar, choose_scalar_below
from moeq_plugin.core.uniformity import score_uniformity
from moeq_plugin.models.elementwise import ElementwiseScale
from moeq_plugin.models.packed import CodebookScale, packed_modules
from moeq_plugin.records.run import Basis, RunRecord

# with the low-rank factors, which stay in 16 bit unless they are named
ALL = ["Linear", r"re:.*\.att\.[wavg][12]$"]
KEPT = ("emb", "lm_head", "ln", "w0", "a0", "v0")


def linears(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def inputs_of(model, data):
    """Return ``[sequences, tokens, in]`` inputs of every linear and element-wise weight."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | ElementwiseScale):
            hooks.append(
                module.register_forward_hook(
                    lambda _m, args, _out, name=name: seen.setdefault(name, []).append(args[0])
                )
            )
    with torch.no_grad():
        for row in data["input_ids"]:
            model(input_ids=torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(of) for name, of in seen.items()}


@pytest.fixture
def model(tmp_path):
    return tiny_rwkv(tmp_path / "model", torch.float32)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Return a model of which six tenths stayed scalar, as it was and where it is; read only."""
    directory = tmp_path_factory.mktemp("half")
    model = tiny_rwkv(directory / "model", torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    recipe = RWKVQuantModifier(scalar_frac=0.6, codebook=FORM, targets=ALL, elementwise=ELEMENTWISE)
    oneshot(model, recipe, output_dir=str(directory / "out"))
    return model, before, directory / "out"


def test_the_most_uniform_share_stays_scalar(half):
    model, before, out = half
    names = [name.removesuffix(".weight") for name in RunRecord.load(out)[0].uniformity]
    scores = {name: score_uniformity(before[f"{name}.weight"]) for name in names}

    expected = choose_scalar(scores, scalar_frac=0.6)

    packed = packed_modules(model)
    elementwise = {name for name, m in packed.items() if isinstance(m, CodebookScale)}
    assert len(names) == 26
    assert set(packed) - elementwise == set(names) - expected
    assert set(linears(model)) == expected
    assert len(elementwise) == 20


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_all_can_have_one_format(fraction, model):
    oneshot(model, RWKVQuantModifier(scalar_frac=fraction, codebook=FORM))

    # and the 14 low-rank factors are linears in 16 bit
    assert len(packed_modules(model)) == (12 if fraction == 0 else 0)
    assert len(linears(model)) == 14 + (0 if fraction == 0 else 12)


def test_thresholds_decide_as_in_the_paper(model):
    scores = {n: score_uniformity(m.weight, "unique") for n, m in linears(model).items()}
    coarse = sorted(s.p_coarse for s in scores.values())[9]
    fine = sorted(s.p_fine for s in scores.values())[15]
    expected = choose_scalar_below(scores, coarse, fine)
    assert 0 < len(expected) < 26

    oneshot(
        model,
        RWKVQuantModifier(thresholds=(coarse, fine), gaps="unique", codebook=FORM, targets=ALL),
    )

    assert set(scores) - set(packed_modules(model)) == expected


def test_embedding_head_norms_and_biases_are_untouched(half):
    model, before, _ = half

    after = dict(model.named_parameters())
    kept = [n for n in before if any(part.startswith(KEPT) for part in n.split("."))]
    assert len(kept) > 20
    assert all(torch.equal(before[n], after[n]) for n in kept)


def test_codebooks_are_solved_on_the_inputs_of_each_linear(model):
    data = dataset()
    name = "model.blocks.0.att.key"  # sees what no quantized layer has changed
    weight = model.get_submodule(name).weight.detach().clone()
    moments = SecondMoments.zeros(64)
    for sequence in inputs_of(model, data)[name]:
        moments.add(sequence)
    expected = solve_codebook(weight, moments.hessian, FORM)

    recipe = RWKVQuantModifier(scalar_frac=0.0, codebook=FORM, preset="fast")
    oneshot(model, recipe, data)

    torch.testing.assert_close(
        model.get_submodule(name).weight, expected.weight.decode(), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
def test_element_wise_weights_are_fitted_to_what_they_multiply(weighted, model):
    data = dataset()
    names = [f"model.blocks.0.att.{name}" for name in ("x_k", "x_g", "k_k", "k_a", "r_k")]
    form = CodebookFormat(3, 1, group_rows=1, group_columns=32)
    inputs, expected = inputs_of(model, data), {}
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        power = ChannelPower.zeros(weight.numel())
        for sequence in inputs[name]:
            power.add(sequence.flatten(1), 97.0)
        encoded = encode(weight.reshape(1, -1), form, power.mean() if weighted else None)
        expected[name] = encoded.decode().view_as(weight)

    oneshot(
        model,
        RWKVQuantModifier(
            elementwise=form, elementwise_weighted=weighted, elementwise_percentile=97
        ),
        data,
    )

    for name in names:
        found = model.get_submodule(name).weight
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)


def test_batches_and_padding_do_not_change_an_element_wise_codebook(tmp_path):
    rows = [[5, 6, 7, 8, 9, 10, 11, 12], [3, 1, 4, 1, 5, 9, 2, 6]]
    weights = []
    for case in ("alone", "padded"):
        model = tiny_rwkv(tmp_path / case, torch.float32)
        ids = rows if case == "alone" else [row + [0] * 5 for row in rows]
        mask = [[1] * 8 + [0] * (len(row) - 8) for row in ids]
        data = dataset().from_dict({"input_ids": ids, "attention_mask": mask})
        recipe = RWKVQuantModifier(
            scalar_frac=1.0, elementwise=ELEMENTWISE, elementwise_percentile=80
        )
        oneshot(model, recipe, data, batch_size=1 if case == "alone" else 2)
        weights.append(model.model.blocks[0].att.x_k.weight)

    torch.testing.assert_close(*weights)


def test_low_rank_factors_get_groups_that_fit(half):
    _, before, out = half
    (run,) = RunRecord.load(out)

    schemes = {r.name: r.scheme for r in run.linears if r.scheme.startswith("W")}

    columns = {name: before[f"{name}.weight"].shape[1] for name in schemes}
    assert schemes == {n: f"W3 asymmetric group {min(64, c)}" for n, c in columns.items()}
    assert min(columns.values()) < 64 < max(columns.values())


def test_a_fallback_scheme_makes_a_plain_compressed_tensors_checkpoint(model, tmp_path):
    finer = {"num_bits": 4, "symmetric": False, "group_size": 32}

    oneshot(
        model,
        RWKVQuantModifier(scalar_frac=0.6, fallback_scheme=finer, targets=ALL),
        output_dir=str(tmp_path / "out"),
    )

    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    bits = {t: g["weights"]["num_bits"] for g in config["config_groups"].values()
            for t in g["targets"]}  # fmt: skip
    run = json.loads((tmp_path / "out" / "moeq_run.json").read_text())["runs"][0]
    assert len(bits) == 26
    assert bits == {n: 3 if s["scalar"] else 4 for n, s in run["uniformity"].items()}
    assert not packed_modules(model)


def test_a_preset_can_be_the_scalar_scheme(tmp_path):
    widths = [name for name in SIZES if name.endswith(("_size", "_low_rank_dim"))]
    model = tiny_rwkv(tmp_path / "model", torch.float32, **dict.fromkeys(widths, 128))
    recipe = RWKVQuantModifier(
        scheme="W8A16",
        scalar_frac=0.6,
        fallback_scheme={"num_bits": 6, "symmetric": True},
        targets=ALL,
    )

    oneshot(model, recipe)

    bits = [m.quantization_scheme.weights.num_bits for m in linears(model).values()]
    assert (bits.count(8), bits.count(6)) == (16, 10)
    assert (recipe.scheme, recipe.config_groups) == ("W8A16", None)


def test_schemes_of_the_user_are_used(model):
    groups = int4(8)
    groups["group_0"]["targets"] = ALL
    recipe = RWKVQuantModifier(config_groups=groups, scalar_frac=0.6, codebook=FORM)

    oneshot(model, recipe)

    schemes = {m.quantization_scheme.weights.num_bits for m in linears(model).values()}
    assert schemes == {4}
    assert len(linears(model)) == 16


def stored_bits(directory, names):
    """Return the bits that the file holds of these modules, without the shapes of their weights."""
    tensors = load_file(directory / "model.safetensors")
    stored = {name: t for name, t in tensors.items() if not name.endswith(".weight_shape")}
    return sum(8 * t.nbytes for name, t in stored.items() if name.rpartition(".")[0] in names)


def test_the_record_names_scores_bits_and_every_weight(half):
    model, before, out = half
    (run,) = RunRecord.load(out)
    packed = packed_modules(model)
    elementwise = {name for name, module in packed.items() if isinstance(module, CodebookScale)}
    names = {r.name for r in run.linears}
    assert len(run.linears) == len(names) == 26 + 20
    assert names == set(linears(model)) | set(packed)
    assert {r.basis for r in run.linears} == {Basis.OWN}
    assert all(r.loss is not None and math.isfinite(r.loss) for r in run.linears)
    assert run.uniformity == {
        name: {**asdict(score_uniformity(before[f"{name}.weight"])), "scalar": name not in packed}
        for name in names - elementwise
    }
    assert run.kept == {"lm_head": "output embedding"}
    num_weights = sum(before[f"{name}.weight"].numel() for name in names)
    assert run.bits_per_weight == pytest.approx(stored_bits(out, names) / num_weights)


def test_the_recipe_decides_for_itself_again(half):
    (again,) = Recipe.create_instance(str(half[2] / "recipe.yaml")).modifiers
    assert isinstance(again, RWKVQuantModifier)
    assert (again.scalar_frac, again.codebook, again.ignore) == (0.6, FORM, [])
    assert again.config_groups is None


def test_degenerate_weights_stay_scalar_and_are_reported(model, tmp_path):
    with torch.no_grad():
        model.model.blocks[0].att.w1.weight.zero_()
        model.model.blocks[1].att.key.weight.fill_(0.25)

    recipe = RWKVQuantModifier(scalar_frac=0.0, codebook=FORM, targets=ALL)
    oneshot(model, recipe, output_dir=str(tmp_path / "out"))

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").dequantize().model
    uniformity = RunRecord.load(tmp_path / "out")[0].uniformity
    flagged = {n for n, s in uniformity.items() if s["degenerate"]}
    assert flagged == {"model.blocks.0.att.w1", "model.blocks.1.att.key"}
    assert {n for n, s in uniformity.items() if s["scalar"]} == flagged
    assert not loaded.blocks[0].att.w1.weight.any()
    weight = loaded.blocks[1].att.key.weight
    torch.testing.assert_close(weight, torch.full_like(weight, 0.25))


def test_experts_of_one_layer_share_a_format(tmp_path):
    model = tiny_model("qwen3_moe", tmp_path / "moe")

    oneshot(
        model,
        RWKVQuantModifier(scalar_frac=0.5, codebook=FORM),
        output_dir=str(tmp_path / "out"),
    )

    scalar = {n: s["scalar"] for n, s in RunRecord.load(tmp_path / "out")[0].uniformity.items()}
    assert not [n for n in scalar if n.endswith(".gate")]  # routers
    for layer in ("layers.0.", "layers.1."):
        for part in (".experts.", "self_attn.q", "self_attn.k", "self_attn.v"):
            group = ".experts." if part == ".experts." else "self_attn."
            names = [n for n in scalar if layer in n and group in n and not n.endswith("o_proj")]
            assert len({scalar[n] for n in names}) == 1
    assert len(set(scalar.values())) == 2


def refuses(message, model, recipe):
    """Assert the error and that no weight has moved."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        oneshot(model, recipe)
    assert all(torch.equal(p.nan_to_num(), before[n].nan_to_num())
               for n, p in model.named_parameters())  # fmt: skip


def test_a_weight_that_is_not_finite_is_named(model):
    with torch.no_grad():
        model.model.blocks[1].ffn.key.weight[3, 2] = torch.nan

    message = r"contain NaN or infinity, nothing was quantized: model.blocks.1.ffn.key.weight"
    refuses(message, model, RWKVQuantModifier())


def test_vectors_that_do_not_fit_are_named(tmp_path):
    model = tiny_rwkv(tmp_path / "odd", v_low_rank_dim=6)

    recipe = RWKVQuantModifier(scalar_frac=0.0, codebook=CodebookFormat(6, 4, 64, 32), targets=ALL)
    refuses(r"vector_dim 4 must divide .* not for model.blocks.1.att.v2; use 1", model, recipe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scalar_frac": 1.5}, "less than or equal to 1"),
        ({"gaps": "most"}, "'quantile', 'all' or 'unique'"),
        ({"codebook": {"index_bits": 20}}, "index_bits must be 1 to 12, got 20"),
        ({"elementwise": CodebookFormat(3, 1, 2, 32)}, "elementwise.group_rows must be 1, .* 2"),
        ({"elementwise_percentile": 0}, "greater than 0"),
        ({"refine_steps": -1}, "greater than or equal to 0"),
        ({"fallback_scheme": "W4A17"}, "'W4A17' is not a scheme"),
        ({"fallback_scheme": "W8A8"}, "'W8A8' has to be a scheme that quantizes weights alone"),
        (
            {"fallback_scheme": "W4A16", "elementwise": CodebookFormat(3, 1, 1, 64)},
            "leave out `elementwise` or fallback_scheme",
        ),
        ({"scalar_fraction": 0.9}, "scalar_fraction"),
        (
            {"bits_per_weight": 3, "scalar_frac": 0.5, "codebook": FORM},
            "by what they lose: leave out scalar_frac and codebook",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        RWKVQuantModifier(**arguments)
