"""Files beside the weights: left over, broken, of another model."""

import json

import pytest
import torch
from checkpoints import copy_of, edited_json, edited_tensors
from planted import Planted, assert_found, file, ids
from safetensors.torch import load_file, save_file

from moeq_plugin import verify_checkpoint

INDEX = "model.safetensors.index.json"
VOCABULARY = {f"t{number}": number for number in range(120)}
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "t0"},
}
TOKENIZER_CONFIG = {"bos_token": "t1", "eos_token": "t2", "chat_template": "{{ messages }}"}


def with_tokenizer(path):
    """Give a directory a tokenizer and settings of generation."""
    file("tokenizer.json", TOKENIZER)(path)
    file("tokenizer_config.json", TOKENIZER_CONFIG)(path)
    file("generation_config.json", {"eos_token_id": 2, "bos_token_id": 1})(path)
    return path


def tokenizer(**changes):
    return file("tokenizer.json", {**TOKENIZER, **changes})


def vocabulary(**changes):
    model = {**TOKENIZER["model"], "vocab": {**VOCABULARY, **changes}}
    return tokenizer(model=model)


def stale(name, names=("model.norm.weight",)):
    def damage(path):
        save_file({tensor: torch.zeros(64) for tensor in names}, path / name)

    return damage


def generation(**changes):
    return file("generation_config.json", {"eos_token_id": 2, "bos_token_id": 1, **changes})


def index_names_another_file(path):
    with edited_json(path / INDEX) as index:
        first, second = sorted(set(index["weight_map"].values()))
        name = next(n for n, f in index["weight_map"].items() if f == first)
        index["weight_map"][name] = second


def index_of_fewer_files(path):
    with edited_json(path / INDEX) as index:
        files = index["weight_map"]
        last = max(files.values())
        index["weight_map"] = {name: f for name, f in files.items() if f != last}


def two_configs(**changes):
    base = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False}
    return file("quantize_config.json", base | changes)


ALONE = [
    Planted("beside the single file", stale("model-00002-of-00002.safetensors"), ("stale-file",)),
    Planted("an older model", stale("old.safetensors"), ("stale-file",)),
    Planted(
        "beside the index", stale("model-00003-of-00003.safetensors"), ("stale-file",), "shards"
    ),
    Planted("single beside the index", stale("model.safetensors"), ("stale-file",), "shards"),
    Planted(
        "index that names another file",
        index_names_another_file,
        ("index-names-absent-tensor",),
        "shards",
    ),
    Planted(
        "index of fewer files", index_of_fewer_files, ("stale-file", "missing-tensor"), "shards"
    ),
    Planted(
        "index of nothing",
        file(INDEX, {"weight_map": {}}),
        ("stale-file", "missing-tensor"),
        "shards",
    ),
    Planted("tokenizer that is none", file("tokenizer.json", "{"), ("bad-json",)),
    Planted("tokenizer without tokens", file("tokenizer.json", "{}"), ("tokenizer",)),
    Planted("tokens beyond the embedding", vocabulary(extra=128), ("tokenizer",)),
    Planted(
        "added tokens beyond the embedding",
        tokenizer(added_tokens=[{"id": 200, "content": "<x>"}]),
        ("tokenizer",),
    ),
    Planted("two tokens of one number", vocabulary(extra=5), ("tokenizer",)),
    Planted("a token of no number", vocabulary(extra="five"), ("tokenizer",)),
    Planted(
        "settings of the tokenizer cut off", file("tokenizer_config.json", '{"bos'), ("bad-json",)
    ),
    Planted("empty template", file("chat_template.jinja", ""), ("tokenizer",)),
    Planted("empty merges", file("merges.txt", ""), ("tokenizer",)),
    Planted("generation config that is none", file("generation_config.json", "[]"), ("bad-json",)),
    Planted("end beyond the vocabulary", generation(eos_token_id=500), ("generation-config",)),
    Planted("end in words", generation(eos_token_id="</s>"), ("generation-config",)),
    Planted("negative temperature", generation(temperature=-1.0), ("generation-config",)),
    Planted("no temperature", generation(temperature=float("nan")), ("generation-config",)),
    Planted("chances above 1", generation(top_p=7.0), ("generation-config",)),
    Planted("no repetition", generation(repetition_penalty=0.0), ("generation-config",)),
    Planted("two configs of other bits", two_configs(bits=8), ("two-configs",), "GPTQ format"),
    Planted(
        "two configs of other groups", two_configs(group_size=128), ("two-configs",), "GPTQ format"
    ),
    Planted(
        "two configs of other zero points", two_configs(sym=False), ("two-configs",), "GPTQ format"
    ),
    Planted(
        "two configs of other orders", two_configs(desc_act=True), ("two-configs",), "GPTQ format"
    ),
    Planted(
        "two configs of other versions",
        two_configs(checkpoint_format="gptq_v2"),
        ("two-configs",),
        "GPTQ format",
    ),
    Planted(
        "second config that is none",
        file("quantize_config.json", "{"),
        ("bad-json",),
        "GPTQ format",
    ),
    Planted("second config left over", two_configs(), ("two-configs",)),
]
AGAINST_SOURCE = {
    "another vocabulary": (vocabulary(t5=6, t6=5), "tokenizer.json: model.vocab"),
    "another splitting": (tokenizer(pre_tokenizer=None), "tokenizer.json: pre_tokenizer"),
    "other added tokens": (
        tokenizer(added_tokens=[{"id": 125, "content": "<x>"}]),
        "tokenizer.json: added_tokens",
    ),
    "another end": (generation(eos_token_id=3), "generation_config.json: eos_token_id"),
    "another begin": (generation(bos_token_id=3), "generation_config.json: bos_token_id"),
    "another end of texts": (
        file("tokenizer_config.json", TOKENIZER_CONFIG | {"eos_token": "t9"}),
        "tokenizer_config.json: eos_token",
    ),
    "another template": (
        file("tokenizer_config.json", TOKENIZER_CONFIG | {"chat_template": "{{ x }}"}),
        "tokenizer_config.json: chat_template",
    ),
    "half a tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json"),
}


@pytest.mark.parametrize("fault", ALONE, ids=ids(ALONE))
def test_files_that_do_not_belong_or_do_not_fit_are_found(fault, sound, tmp_path):
    assert_found(fault, sound, tmp_path)


@pytest.mark.parametrize("name", AGAINST_SOURCE)
def test_files_that_are_not_the_sources_are_found(name, sound, tmp_path):
    original = sound("qwen3_moe")
    source = with_tokenizer(copy_of(original.parent / "model", tmp_path / "model"))
    path = with_tokenizer(copy_of(original, tmp_path / "out"))
    assert verify_checkpoint(path, source).findings == ()

    damage, where = AGAINST_SOURCE[name]
    damage(path)

    assert where in {found.where for found in verify_checkpoint(path, source).errors}


def test_a_tokenizer_saved_again_is_the_same(sound, tmp_path):
    original = sound("qwen3_moe")
    source = with_tokenizer(copy_of(original.parent / "model", tmp_path / "model"))
    path = with_tokenizer(copy_of(original, tmp_path / "out"))
    tokenizer(truncation={"max_length": 8}, padding={"strategy": "BatchLongest"})(path)
    settings = {**TOKENIZER_CONFIG, "eos_token": {"content": "t2"}, "pad_token": "t2"}
    template = settings.pop("chat_template")
    file("tokenizer_config.json", settings)(path)
    file("chat_template.jinja", template)(path)
    assert verify_checkpoint(path, source).findings == ()


def test_all_readers_read_the_same_files(sound, tmp_path):
    """What is left over beside the weights changes nothing but the verdict."""
    from moeq_plugin.integrations.hf.gptq.convert import convert
    from moeq_plugin.integrations.llm_compressor import load_dequantized
    from moeq_plugin.report.stored import read_stored

    path = copy_of(sound("qwen3_moe"), tmp_path / "out")
    before, weights = read_stored(path), load_dequantized(path).state_dict()
    save_file({"model.norm.weight": torch.zeros(64)}, path / "zz.safetensors")

    assert {found.check for found in verify_checkpoint(path).errors} == {"stale-file"}
    assert read_stored(path) == before
    after = load_dequantized(path).state_dict()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    convert(path, tmp_path / "gptq", "gptq")
    assert load_file(tmp_path / "gptq" / "model.safetensors")["model.norm.weight"].all()
    assert not (tmp_path / "gptq" / "zz.safetensors").exists()


@pytest.mark.parametrize("key", ["bits", "group_size", "sym", "desc_act"])
def test_converting_refuses_two_configs_that_differ(key, sound, tmp_path):
    from moeq_plugin.integrations.hf.gptq.convert import convert

    path = copy_of(sound("GPTQ format"), tmp_path / "out")
    other = {"bits": 8, "group_size": 128, "sym": False, "desc_act": True}[key]
    two_configs(**{key: other})(path)
    with pytest.raises(ValueError, match=rf"quantize_config\.json says another {key}"):
        convert(path, tmp_path / "packed", "compressed-tensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda found: _edit(found, "g_idx", lambda t: t.flip(0)), "act order"),
        (lambda found: _edit(found, "qzeros", torch.zeros_like), "other zero points"),
        (
            lambda found: _edit(found, "qzeros", lambda t: torch.full_like(t, -0x77777778)),
            "says sym",
        ),
    ],
)
def test_converting_refuses_what_verify_finds_in_the_gptq_format(damage, message, sound, tmp_path):
    from moeq_plugin.integrations.hf.gptq.convert import convert

    path = copy_of(sound("GPTQ format"), tmp_path / "out")
    with edited_tensors(path) as found:
        damage(found)
    assert verify_checkpoint(path).errors
    with pytest.raises(ValueError, match=message):
        convert(path, tmp_path / "packed", "compressed-tensors")


def _edit(found, suffix, change):
    for name in [name for name in found if name.endswith(suffix)]:
        found[name] = change(found[name])


def test_the_report_of_a_stale_file_is_json(sound, tmp_path):
    path = copy_of(sound("qwen3_moe"), tmp_path / "out")
    stale("old.safetensors")(path)
    content = json.loads(json.dumps(verify_checkpoint(path).to_dict()))
    assert [found["where"] for found in content["findings"]] == ["old.safetensors"]
