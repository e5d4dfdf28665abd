import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from stored_checkpoints import (
    LINEARS,
    PLAIN,
    gptq_section,
    gptq_tensors,
    packed_section,
    packed_tensors,
    random_linears,
    write_checkpoint,
)

from moeq_plugin.cli import app
from moeq_plugin.core.gptq_format import WIDTHS, Codes, GPTQTensors, ZeroPoints, decode
from moeq_plugin.core.grid import Grid
from moeq_plugin.integrations.hf.gptq.convert import convert
from moeq_plugin.integrations.hf.gptq.names import Names

W4 = Grid(4, 32)


def load(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def packed(directory: Path, grid: Grid = W4, signed: bool = False, **arguments) -> Path:
    tensors = packed_tensors(random_linears(grid, signed=signed), grid)
    return write_checkpoint(directory, tensors, packed_section(grid), **arguments)


def gptq(directory: Path, grid: Grid = W4, zeros: ZeroPoints = ZeroPoints.V1, **section) -> Path:
    tensors = gptq_tensors(random_linears(grid), grid, zeros)
    return write_checkpoint(directory, tensors, gptq_section(grid, **section))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[k], right[k]) and left[k].dtype == right[k].dtype for k in left
    )


@pytest.mark.parametrize("kind", ["symmetric", "signed", "asymmetric"])
@pytest.mark.parametrize("group_size", [16, None], ids=["groups", "channel"])
@pytest.mark.parametrize("num_bits", WIDTHS)
def test_both_formats_stand_for_the_same_numbers(num_bits, group_size, kind, tmp_path):
    grid = Grid(num_bits, group_size, symmetric=kind != "asymmetric")
    source = packed(tmp_path / "packed", grid, signed=kind == "signed")

    assert convert(source, tmp_path / "gptq", "gptq") == len(LINEARS)
    convert(tmp_path / "gptq", tmp_path / "again", "compressed-tensors")

    before, between = load(source), load(tmp_path / "gptq")
    scheme = QuantizationConfig.model_validate(config_of(source)).config_groups["group_0"]
    theirs = BaseCompressor.get_value_from_registry("pack-quantized")
    zeros = ZeroPoints(config_of(tmp_path / "gptq")["checkpoint_format"])
    for name in LINEARS:
        stored = {p: between[f"{name}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx")}
        ours = decode(GPTQTensors(**stored), num_bits, zeros).dequantize()
        of_linear = {
            k.removeprefix(f"{name}."): v for k, v in before.items() if k.startswith(f"{name}.")
        }
        assert torch.equal(ours, theirs.decompress(of_linear, scheme)["weight"]), name
    assert all(torch.equal(between[name], before[name]) for name in PLAIN)
    assert same(load(tmp_path / "again"), before)


@pytest.mark.parametrize("zeros", list(ZeroPoints))
def test_gptq_checkpoints_come_back_as_they_were(zeros, tmp_path):
    grid = Grid(3, 32, symmetric=False)
    source = gptq(tmp_path / "gptq", grid, zeros, checkpoint_format=zeros.value)
    convert(source, tmp_path / "packed", "compressed-tensors")
    convert(tmp_path / "packed", tmp_path / "again", "gptq", zero_points=zeros)
    assert same(load(tmp_path / "again"), load(source))
    assert config_of(tmp_path / "again")["checkpoint_format"] == zeros.value


def test_old_checkpoints_without_g_idx_are_read(tmp_path):
    tensors = gptq_tensors(random_linears(W4), W4)
    tensors = {name: t for name, t in tensors.items() if not name.endswith("g_idx")}
    source = write_checkpoint(tmp_path / "gptq", tensors, gptq_section(W4))
    convert(source, tmp_path / "packed", "compressed-tensors")
    expected = packed_tensors(random_linears(W4), W4)
    found = load(tmp_path / "packed")
    assert all(torch.equal(found[k], expected[k]) for k in expected if "self_attn" in k)


def test_the_configuration_is_read_from_quantize_config_json_where_config_json_has_none(tmp_path):
    tensors = gptq_tensors(random_linears(W4), W4)
    source = write_checkpoint(tmp_path / "gptq", tensors, None)
    section = {k: v for k, v in gptq_section(W4).items() if k != "quant_method"}
    (source / "quantize_config.json").write_text(json.dumps(section))
    assert convert(source, tmp_path / "packed", "compressed-tensors") == len(LINEARS)


def test_both_configurations_of_a_gptq_checkpoint_say_the_same(tmp_path):
    convert(packed(tmp_path / "packed"), tmp_path / "gptq", "gptq")
    section = config_of(tmp_path / "gptq")
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text()) == section
    expected = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False}
    assert section.items() >= expected.items()
    assert section["checkpoint_format"] == "gptq"
    # the router is a matrix among the layers; the embedding is outside of them
    assert list(section["dynamic"]) == [r"-:^model\.layers\.0\.mlp\.gate$"]


def test_the_packed_configuration_ignores_what_is_not_quantized(tmp_path):
    convert(gptq(tmp_path / "gptq"), tmp_path / "packed", "compressed-tensors")
    section = config_of(tmp_path / "packed")
    assert set(section["ignore"]) == {"model.embed_tokens", "model.layers.0.mlp.gate"}
    weights = section["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 32, True)
    assert (section["quant_method"], section["format"]) == ("compressed-tensors", "pack-quantized")


def test_asymmetric_weights_get_version_2_unless_asked_otherwise(tmp_path):
    source = packed(tmp_path / "packed", Grid(4, 32, symmetric=False))
    convert(source, tmp_path / "v2", "gptq")
    convert(source, tmp_path / "v1", "gptq", zero_points=ZeroPoints.V1)
    assert config_of(tmp_path / "v2")["checkpoint_format"] == "gptq_v2"
    assert config_of(tmp_path / "v1")["checkpoint_format"] == "gptq"
    name = "model.layers.0.self_attn.q_proj.qzeros"
    assert not torch.equal(load(tmp_path / "v1")[name], load(tmp_path / "v2")[name])


def test_parts_of_a_linear_may_lie_in_different_files(tmp_path):
    source = packed(tmp_path / "packed", num_files=3)
    convert(source, tmp_path / "gptq", "gptq")
    index = json.loads((tmp_path / "gptq" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "gptq" / file)
    assert index["weight_map"].keys() == load(tmp_path / "gptq").keys()
    convert(packed(tmp_path / "one"), tmp_path / "whole", "gptq")
    converted, whole = load(tmp_path / "gptq"), load(tmp_path / "whole")
    assert all(torch.equal(converted[k], whole[k]) for k in whole if k not in PLAIN)


def test_other_files_come_along_but_not_the_card_of_the_other_format(tmp_path):
    convert(packed(tmp_path / "packed"), tmp_path / "out" / "gptq", "gptq")
    assert {path.name for path in (tmp_path / "out" / "gptq").iterdir()} == {
        "config.json", "quantize_config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "gptq"]


def mixtral(directory: Path) -> Path:
    """Write a checkpoint under Mixtral's own names."""
    theirs = {"gate_proj": "w1", "down_proj": "w2"}

    def renamed(name):
        for ours, its in theirs.items():
            name = name.replace(ours, its)
        return name.replace(".mlp.", ".block_sparse_moe.")

    tensors = packed_tensors(random_linears(W4), W4)
    tensors = {renamed(name): tensor for name, tensor in tensors.items()}
    return write_checkpoint(directory, tensors, packed_section(W4), model_type="mixtral")


def test_mixtral_keeps_its_names_or_gets_those_of_modules(tmp_path):
    source = mixtral(tmp_path / "packed")
    convert(source, tmp_path / "gptq", "gptq")
    convert(source, tmp_path / "modules", "gptq", names=Names.MODULES)
    theirs, modules = load(tmp_path / "gptq"), load(tmp_path / "modules")
    for theirs_name, module in {
        "block_sparse_moe.experts.1.w1.qweight": "mlp.experts.1.gate_proj.qweight",
        "block_sparse_moe.experts.0.w2.scales": "mlp.experts.0.down_proj.scales",
        "block_sparse_moe.gate.weight": "mlp.gate.weight",
    }.items():
        found = theirs[f"model.layers.0.{theirs_name}"]
        assert torch.equal(found, modules[f"model.layers.0.{module}"])
    assert list(config_of(tmp_path / "modules")["dynamic"]) == [r"-:^model\.layers\.0\.mlp\.gate$"]
    assert not [name for name in modules if "block_sparse" in name or ".w" in name[:-7]]


@pytest.mark.parametrize("names", list(Names))
def test_packed_mixtral_always_has_the_names_that_loading_expects(names, tmp_path):
    source = mixtral(tmp_path / "packed")
    convert(source, tmp_path / "gptq", "gptq", names=names)
    convert(tmp_path / "gptq", tmp_path / "again", "compressed-tensors")
    assert same(load(tmp_path / "again"), load(source))
    assert "model.layers.0.block_sparse_moe.gate" in config_of(tmp_path / "again")["ignore"]


def changed(section: dict, **changes) -> dict:
    return section | changes


def mixed() -> dict:
    section = packed_section(W4)
    other = packed_section(Grid(8, 32))["config_groups"]["group_0"]
    section["config_groups"]["group_1"] = other | {"targets": ["re:.*down_proj$"]}
    return section


def with_activations() -> dict:
    section = packed_section(W4)
    section["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    return section


def in_format(form: str) -> dict:
    section = packed_section(W4)
    section["config_groups"]["group_0"]["format"] = form
    return section


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (mixed(), r"one scheme for all weights, the checkpoint has 2 \(group_0.*group_1"),
        (with_activations(), "quantizes weights, not activations"),
        (in_format("int-quantized"), "expected packed integer weights .* 'int-quantized'"),
        (packed_section(W4, type="float"), "got .*FLOAT|got float"),
        (packed_section(W4, strategy="tensor", group_size=None), "with strategy"),
        (packed_section(Grid(5, 32)), "the checkpoint 5"),
        (changed(packed_section(W4), kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (
            changed(packed_section(W4), transform_config={"config_groups": {"u": {}}}),
            "cannot express transforms",
        ),
        (changed(packed_section(W4), quant_method="moeq"), "has weights in codebooks"),
        (changed(packed_section(W4), quant_method="awq"), "quant_method 'awq'; can convert"),
        (gptq_section(W4), "in the format 'gptq' already"),
        (None, "is not quantized"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_gptq_format_cannot_express_is_refused(section, message, tmp_path):
    tensors = packed_tensors(random_linears(W4), W4)
    source = write_checkpoint(tmp_path / "packed", tensors, section)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "gptq", "gptq")
    assert not (tmp_path / "gptq").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (gptq_section(W4, dynamic={"+:.*q_proj": {"bits": 8}}), r"\+:\.\*q_proj.*Only one scheme"),
        (gptq_section(W4, checkpoint_format="marlin"), "'marlin' is not a portable GPTQ format"),
        (gptq_section(W4, bits=5), "the checkpoint 5"),
        ({"quant_method": "gptq", "bits": 4}, r"lacks \['group_size', 'sym'\]"),
        (gptq_section(W4, quant_method="awq"), "quant_method 'awq'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_gptq_configuration_cannot_mean_is_refused(section, message, tmp_path):
    source = write_checkpoint(tmp_path / "gptq", gptq_tensors(random_linears(W4), W4), section)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "packed", "compressed-tensors")


def test_rules_that_only_exclude_modules_are_no_obstacle(tmp_path):
    source = gptq(tmp_path / "gptq", dynamic={r"-:.*gate$": {}})
    assert convert(source, tmp_path / "packed", "compressed-tensors") == len(LINEARS)


def test_act_order_is_refused_by_name(tmp_path):
    linears = random_linears(W4)
    name = "model.layers.0.self_attn.q_proj"
    shuffled = linears[name].group[torch.randperm(96, generator=torch.Generator().manual_seed(0))]
    weight = linears[name]
    linears[name] = Codes(weight.codes, weight.scale, weight.zero_point, shuffled)
    section = gptq_section(W4, desc_act=True)
    source = write_checkpoint(tmp_path / "gptq", gptq_tensors(linears, W4), section)
    with pytest.raises(ValueError, match=rf"1 linears have act order .* express: {name}\."):
        convert(source, tmp_path / "packed", "compressed-tensors")


def test_a_symmetric_configuration_over_shifted_zero_points_is_refused(tmp_path):
    grid = Grid(4, 32, symmetric=False)
    tensors = gptq_tensors(random_linears(grid), grid)
    source = write_checkpoint(tmp_path / "gptq", tensors, gptq_section(W4))
    with pytest.raises(ValueError, match="says sym, but 5 linears have other zero points"):
        convert(source, tmp_path / "packed", "compressed-tensors")


def test_a_zero_point_of_0_is_refused_in_version_1_only(tmp_path):
    grid = Grid(2, 32, symmetric=False)
    tensors = packed_tensors(random_linears(grid, lowest_zero=grid.lowest), grid)
    source = write_checkpoint(tmp_path / "packed", tensors, packed_section(grid))
    with pytest.raises(ValueError, match="5 linears have a zero point of 0, .* version 2"):
        convert(source, tmp_path / "v1", "gptq", zero_points=ZeroPoints.V1)
    assert convert(source, tmp_path / "v2", "gptq") == len(LINEARS)


def test_every_tensor_that_disagrees_with_the_configuration_is_listed(tmp_path):
    tensors = packed_tensors(random_linears(W4), W4)
    expert = "model.layers.0.mlp.experts.1.gate_proj"
    del tensors[f"{expert}.weight_scale"]
    del tensors["model.layers.0.mlp.experts.0.gate_proj.weight_packed"]
    del tensors["model.layers.0.mlp.experts.0.down_proj.weight_shape"]
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.weight_packed"] = tensors[f"{name}.weight_packed"][:, 1:]
    source = write_checkpoint(tmp_path / "packed", tensors, packed_section(W4))
    with pytest.raises(ValueError) as caught:
        convert(source, tmp_path / "gptq", "gptq")
    message = str(caught.value)
    assert message.startswith("5 tensors disagree with the configuration")
    for problem in (
        f"{expert}.weight_scale is missing",
        f"{name}.weight_packed is [64, 11], expected [64, 12]",
        "experts.0.gate_proj.weight_scale belongs to no linear with a weight_packed",
        "experts.0.down_proj.weight_shape is missing",
    ):
        assert problem in message


def test_gptq_tensors_of_another_group_size_are_listed(tmp_path):
    tensors = gptq_tensors(random_linears(W4), W4)
    source = write_checkpoint(tmp_path / "gptq", tensors, gptq_section(Grid(4, 16)))
    with pytest.raises(ValueError) as caught:
        convert(source, tmp_path / "packed", "compressed-tensors")
    assert "q_proj.scales is [3, 64], expected [6, 64]" in str(caught.value)
    assert "q_proj.qzeros is [3, 8], expected [6, 8]" in str(caught.value)
    assert "10 tensors disagree" in str(caught.value)


def test_nothing_is_left_behind_where_converting_fails_half_way(tmp_path):
    """The last linear has 20 outputs, whose zero points do not fill whole words of 3 bits."""
    grid = Grid(3, 32)
    linears = random_linears(grid)
    name, weight = list(linears.items())[-1]
    cut = Codes(weight.codes[:20], weight.scale[:20], weight.zero_point[:20], weight.group)
    tensors = packed_tensors({**linears, name: cut}, grid)
    source = write_checkpoint(tmp_path / "packed", tensors, packed_section(grid), num_files=2)
    with pytest.raises(ValueError, match=f"{name}: 20 values of 3 bits"):
        convert(source, tmp_path / "out" / "gptq", "gptq")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_directory_with_files_in_it_is_refused(tmp_path):
    source = packed(tmp_path / "packed")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    with pytest.raises(ValueError, match="out is not empty; nothing was written"):
        convert(source, tmp_path / "out", "gptq")
    assert (tmp_path / "out" / "precious").exists()


def cut_off(directory):
    file = packed(directory) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:40])


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda d: None, "config.json cannot be read: No such file"),
        (lambda d: write_checkpoint(d, {}, packed_section(W4), num_files=0), "no .*safetensors"),
        (cut_off, "model.safetensors: the header is to have [0-9]+ bytes, the file has 40 in all"),
    ],
    ids=["no-directory", "no-weights", "cut-off"],
)
def test_a_directory_that_is_no_checkpoint_is_refused(prepare, message, tmp_path):
    prepare(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "out", "gptq")


def test_the_command_converts_and_says_what_is_wrong(tmp_path):
    source = packed(tmp_path / "packed")
    done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "a"), "--to", "gptq"])
    assert done.exit_code == 0, done.output
    assert "5 linears, not one code changed" in done.output
    for arguments, message in (
        (["--to", "gguf"], "unknown format 'gguf'; expected one of"),
        (["--to", "gptq", "--zero-points", "v3"], "'v3' is not a valid ZeroPoints"),
        (["--to", "gptq", "--names", "mine"], "'mine' is not a valid Names"),
    ):
        done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "b"), *arguments])
        assert done.exit_code == 2, done.output
        assert message in done.output
