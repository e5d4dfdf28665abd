"""oneshot, from_pretrained and Optimum's interface: one model, one set, one seed, one result."""

import json
import re
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from helpers import dataset, int4, oneshot, tiny_model, tokens
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("llmcompressor")

from llmcompressor.modeling.moe.linearize import linearize_moe
from loguru import logger

from moeq_plugin import MoEQuantConfig, MoEQuantModifier
from moeq_plugin.integrations.hf.coverage import check_coverage
from moeq_plugin.integrations.hf.gptq.convert import convert
from moeq_plugin.integrations.hf.gptq.quantizer import HOST_DECIDES, MoEGPTQQuantizer
from moeq_plugin.integrations.hf.quantize_model import as_dataset
from moeq_plugin.models.moe import find_moe_layers

ENTRY_POINTS = ["from_pretrained", "Optimum"]
OWN_TEXT = {"ebss": {"num_sequences": 4, "seq_len": 16}}
SIZES = {"deepseek_v2": {"kv_lora_rank": 32, "num_hidden_layers": 2}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a function from a family to its model's directory, with a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    words = models.WordLevel({str(i): i for i in range(128)}, "0")

    def save(family):
        if not (root / family).exists():
            tiny_model(family, root / family, **SIZES.get(family, {}))
            PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(
                root / family
            )
        return root / family

    return save


@pytest.fixture
def log():
    lines = []
    handle = logger.add(lines.append, level="INFO", format="{message}")
    yield lines
    logger.remove(handle)


def load(directory, **arguments):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **arguments)


def by_from_pretrained(directory, **settings):
    settings = {"config_groups": int4(16), "dataset": dataset(), **settings}
    return load(directory, quantization_config=MoEQuantConfig(**settings))


def by_optimum(directory, **settings):
    quantizer = MoEGPTQQuantizer(**{"bits": 4, "group_size": 16, "dataset": dataset(), **settings})
    return quantizer, quantizer.quantize_model(load(directory))


def through(entry_point, directory):
    if entry_point == "from_pretrained":
        return by_from_pretrained(directory)
    return by_optimum(directory)[1]


def codes(directory):
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("data", [dataset(), None], ids=["data", "own-text"])
def test_the_three_entry_points_give_identical_codes(family, data, saved, tmp_path):
    directory = saved(family)
    model = load(directory)
    arguments = {"processor": PreTrainedTokenizerFast.from_pretrained(directory)}
    recipe = MoEQuantModifier(config_groups=int4(16), **OWN_TEXT)
    if data is None:
        from llmcompressor import oneshot as host

        host(model=model, recipe=recipe, **arguments)
    else:
        oneshot(model, recipe, data, **arguments)
    model.save_pretrained(tmp_path / "oneshot")

    by_from_pretrained(directory, dataset=data, **OWN_TEXT).save_pretrained(tmp_path / "loaded")
    quantizer, model = by_optimum(directory, dataset=data, **OWN_TEXT)
    quantizer.save(model, tmp_path / "gptq")
    convert(tmp_path / "gptq", tmp_path / "optimum", "compressed-tensors")

    expected = codes(tmp_path / "oneshot")
    for other in ("loaded", "optimum"):
        found = codes(tmp_path / other)
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "qwen2_moe"])
def test_all_of_the_blocks_is_quantized_and_said_so(family, entry_point, saved, log):
    model = through(entry_point, saved(family))

    said = next(line for line in log if "of block parameters quantized" in line)
    assert said.startswith("100.00 % of block parameters quantized")
    kept = {"gate", "shared_expert_gate", "lm_head"}  # router, shared expert's gate, output
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    experts = [la.num_experts for la in find_moe_layers(model)]
    routed = [name for name in linears if re.search(r"experts\.\d+\.", name)]
    assert len(routed) == 3 * sum(experts)
    for name, module in linears.items():
        assert hasattr(module, "quantization_scheme") == (name.rpartition(".")[2] not in kept), name


def test_what_is_loaded_is_an_ordinary_model_and_saves_an_ordinary_checkpoint(saved, tmp_path):
    model = by_from_pretrained(saved("qwen3_moe"))
    assert not getattr(model, "hf_quantizer", None)
    model.save_pretrained(tmp_path / "out")
    ids = tokens(2, 16, seed=5)
    torch.save({"ids": ids, "logits": model(ids).logits.detach()}, tmp_path / "expected.pt")

    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "compressed-tensors"
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M\n"
        f"e = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"m, info = M.from_pretrained({str(tmp_path / 'out')!r}, output_loading_info=True)\n"
        "assert not any(info.values()), info\n"
        "assert (m(e['ids']).logits - e['logits']).abs().max() < 1e-5\n"
        "assert not {'moeq_plugin', 'llmcompressor'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modules_outside_the_request_are_an_error_unless_ignored_by_name(saved):
    model = load(saved("qwen3_moe"))
    linearize_moe(model)
    group = int4(16)["group_0"] | {"targets": ["re:.*experts.*"]}
    modifier = MoEQuantModifier(config_groups={"group_0": group})
    with pytest.raises(ValueError, match="8 of 32 linears .* model.layers.0.self_attn.q_proj"):
        check_coverage(model, modifier)
    modifier = MoEQuantModifier(config_groups={"group_0": group}, ignore=["re:.*self_attn.*"])
    coverage = check_coverage(model, modifier)
    experts = 2 * 4 * 3 * 64 * 32
    attention = 2 * (64 * 64 * 2 + 64 * 32 * 2)
    assert (coverage.reached, coverage.total) == (experts, experts + attention)
    assert len(coverage.ignored) == 8
    assert str(coverage) == (
        "66.67 % of block parameters quantized (24 linears, 8 linears ignored by name)"
    )


def test_fused_experts_are_an_error(saved):
    model = load(saved("qwen3_moe"))
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts \(fused\)"):
        check_coverage(model, MoEQuantModifier(config_groups=int4(16)))


def test_optimum_quantizes_only_the_modules_asked_for(saved, tmp_path):
    asked = [["gate_proj", "up_proj"], ["down_proj"]]
    quantizer, model = by_optimum(saved("qwen3_moe"), modules_in_block_to_quantize=asked)
    quantizer.save(model, tmp_path / "gptq")
    names = codes(tmp_path / "gptq")
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert "model.layers.0.mlp.experts.0.down_proj.qweight" in names
    section = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert r"-:^model\.layers\.0\.self_attn\.q_proj$" in section["dynamic"]


@pytest.mark.parametrize(
    ("settings", "section"),
    [
        ({"group_size": 32}, {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}),
        ({"bits": 3, "group_size": -1}, {"bits": 3, "group_size": -1}),
        ({"sym": False}, {"sym": False, "checkpoint_format": "gptq_v2"}),
        ({"format": "gptq_v2"}, {"sym": True, "checkpoint_format": "gptq_v2"}),
    ],
    ids=["4-bit", "channel", "asymmetric", "version-2"],
)
def test_what_optimum_saves_says_what_was_asked(settings, section, saved, tmp_path):
    quantizer, model = by_optimum(saved("qwen3_moe"), **settings)
    quantizer.save(model, tmp_path / "gptq")
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text()).items() >= (
        section.items()
    )
    again = MoEGPTQQuantizer.from_dict(quantizer.to_dict())
    assert again.to_dict() == quantizer.to_dict()


def test_quantizing_writes_nothing_into_its_configuration(saved):
    directory, ignore = saved("qwen3_moe"), ["re:.*self_attn.*"]
    settings = {"config_groups": int4(16), "dataset": dataset(), "ignore": ignore}
    config = MoEQuantConfig(**settings)
    quantizer = MoEGPTQQuantizer(bits=4, group_size=16, dataset=dataset(), ignore=ignore)
    before = deepcopy((config.to_dict(), quantizer.to_dict(), quantizer.ignore))
    kept = {**vars(config)}, {**vars(quantizer)}

    load(directory, quantization_config=config)
    first, second = (quantizer.quantize_model(load(directory)).state_dict() for _ in range(2))

    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert (config.to_dict(), quantizer.to_dict(), quantizer.ignore) == before
    for now, then in zip((vars(config), vars(quantizer)), kept, strict=True):
        assert now.keys() == then.keys()
        assert [name for name in then if now[name] is not then[name]] == []
    assert ignore == ["re:.*self_attn.*"]


def test_a_configuration_of_optimum_itself_is_understood():
    """The arguments and defaults of optimum 2.3's own class."""
    theirs = {
        "bits": 4, "dataset": None, "group_size": 128, "damp_percent": 0.1, "desc_act": False,
        "act_group_aware": True, "sym": True, "true_sequential": True, "quant_method": "gptq",
        "modules_in_block_to_quantize": None, "format": "gptq", "meta": {"quantizer": ["o"]},
        "block_name_to_quantize": None, "module_name_preceding_first_block": None,
        "batch_size": 1, "pad_token_id": None, "cache_block_outputs": True, "backend": None,
        "model_seqlen": None,
    }  # fmt: skip
    described = MoEGPTQQuantizer.from_dict(theirs).to_dict()
    shared = described.keys() & theirs.keys() - {"meta"}
    assert {key: described[key] for key in shared} == {key: theirs[key] for key in shared}
    assert set(HOST_DECIDES) < theirs.keys()


def test_act_group_aware_decides_the_order_of_columns(saved, tmp_path):
    found = []
    for aware in (True, False):
        quantizer, model = by_optimum(saved("qwen3_moe"), act_group_aware=aware)
        quantizer.save(model, tmp_path / str(aware))
        found.append(codes(tmp_path / str(aware)))
    name = "model.layers.0.mlp.experts.0.up_proj.qweight"
    assert not torch.equal(found[0][name], found[1][name])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "W4A16", "affinty_power": 1}, "'affinty_power', did you mean .'affinity_power"),
        ({"scheme": "W4A17"}, "'W4A17' is not a scheme"),
        ({"scheme": "W4A16", "affinity_power": -1}, "greater than or equal to 0"),
        ({"scheme": "W4A16", "dataset": [1, 2]}, r"list of \['int'\]"),
    ],
    ids=lambda value: "",
)
def test_a_wrong_request_is_refused_before_anything_is_loaded(settings, message):
    with pytest.raises(ValueError, match=message):
        MoEQuantConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 4, "group_sise": 64}, "'group_sise', did you mean .'group_size'"),
        ({"bits": 5}, "got bits=5"),
        ({"bits": 4, "group_size": 0}, "group_size must be positive or -1, got 0"),
        ({"bits": 4, "damp_percent": 1.0}, "damp_percent must lie between 0 and 1, got 1.0"),
        ({"bits": 4, "desc_act": True}, "desc_act=True is not offered"),
        ({"bits": 4, "format": "marlin"}, "'marlin' is not a valid ZeroPoints"),
        ({"bits": 4, "names": "mine"}, "'mine' is not a valid Names"),
    ],
    ids=lambda value: "",
)
def test_a_wrong_configuration_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoEGPTQQuantizer.from_dict(settings)


def test_pickled_files_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="safe_serialization=False"):
        MoEGPTQQuantizer(bits=4).save(nn.Module(), tmp_path, safe_serialization=False)


@pytest.mark.parametrize(
    ("data", "column", "row"),
    [
        (["a", "b"], "text", "a"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 1]}], "input_ids", [1, 2]),
        ([{"input_ids": torch.tensor([[1, 2]])}], "input_ids", [1, 2]),
    ],
    ids=["texts", "lists", "tensors"],
)
def test_the_forms_of_data_that_optimum_takes(data, column, row):
    assert as_dataset(data)[column][0] == row


def test_a_missing_extra_names_the_line_that_installs_it():
    code = (
        "import sys; sys.modules['llmcompressor'] = None\n"
        "try: import moeq_plugin.integrations.hf\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'moeq-plugin[llmcompressor]'" in done.stdout
