"""No false alarms: sound checkpoints of all families and formats, for every reader."""

import json

import pytest
import torch
from checkpoints import RECIPES, VARIANTS, copy_of, edited_config, edited_tensors, to_gptq
from helpers import FAMILIES, int4, oneshot, tiny_model

from moeq_plugin import verify_checkpoint
from moeq_plugin.checkpoint.checks.findings import CHECKS
from moeq_plugin.checkpoint.verify import TARGETS

# what is true of sound checkpoints all the same: an error for some reader, a warning for others
UNREADABLE_FOR = {
    "gpt_oss": {"vllm": {"vllm-refuses"}, "transformers": {"transformers-misreads"}},
    "asymmetric": {"transformers": {"transformers-misreads"}},
    "activations": {"transformers": {"transformers-misreads"}},
    "mixed": {"transformers": {"transformers-misreads"}},
    "allocated": {"transformers": {"transformers-misreads"}},
    "a layer in 16 bit": {"transformers": {"transformers-misreads"}},
}
WARNINGS = {"transformers-misreads", "vllm-kernel", "mtp-dropped"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*RECIPES, *VARIANTS])
def test_a_sound_checkpoint_has_no_errors(name, target, sound):
    path = sound(name)

    report = verify_checkpoint(path, path.parent / "model", target=target)

    expected = UNREADABLE_FOR.get(name, {}).get(target, set())
    found_errors = {found.check for found in report.errors}
    assert found_errors == expected or (name == "allocated" and not found_errors)
    assert {found.check for found in report.findings} - expected <= WARNINGS
    assert report.exit_code == (1 if report.errors else 0)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2"])
def test_a_checkpoint_that_everyone_reads_has_no_warnings_either(name, sound):
    assert verify_checkpoint(sound(name)).findings == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_16_bit_model_is_sound(family, sound):
    report = verify_checkpoint(sound(family).parent / "model")
    assert report.errors == []
    assert set(report.schemes) == {"16 bit"}


def test_an_unknown_family_is_judged_by_what_its_experts_have_in_common(sound, tmp_path):
    path = copy_of(sound("qwen3_moe"), tmp_path / "out")
    with edited_config(path) as config:
        config["model_type"] = "something_new"
    (found,) = verify_checkpoint(path).findings  # no rule: experts would stay as initialized
    assert (found.check, found.severity) == ("transformers-misreads", "warning")

    with edited_tensors(path) as tensors:
        for name in [name for name in tensors if ".1.mlp.experts.2." in name]:
            del tensors[name]
    report = verify_checkpoint(path)
    assert [found.check for found in report.errors] == ["missing-expert"]
    assert report.errors[0].where == "model.layers.1.mlp.experts.2"


def test_a_lone_negative_scale_is_named_without_the_source_too(sound, tmp_path):
    """Whoever tries both signs makes many negative: one is more likely a flipped bit."""
    path = copy_of(sound("qwen3_moe"), tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    with edited_tensors(path) as tensors:
        tensors[name] = tensors[name].abs()
        tensors[name][3, 0] *= -1

    (found,) = verify_checkpoint(path).findings
    assert (found.check, found.where, found.severity) == ("scale-sign", name, "warning")


@pytest.mark.parametrize("name", ["MoEQuantAWQModifier", "ResidualRotationModifier"])
def test_weights_that_were_scaled_or_rotated_are_not_held_against_a_checkpoint(name, tmp_path):
    from moeq_plugin import MoEQuantAWQModifier, MoEQuantModifier
    from moeq_plugin.integrations.llm_compressor import ResidualRotationModifier

    before = {
        "MoEQuantAWQModifier": MoEQuantAWQModifier(n_grid=4),
        "ResidualRotationModifier": ResidualRotationModifier(),
    }
    model = tiny_model("qwen3_moe", tmp_path / "model")
    oneshot(model, [before[name], MoEQuantModifier(config_groups=int4(16))])
    model.save_pretrained(tmp_path / "out")

    report = verify_checkpoint(tmp_path / "out", tmp_path / "model")

    assert report.errors == []
    assert [found.check for found in report.findings] == ["not-comparable"]
    assert report.findings[0].what.startswith(f"{name} changed the weights")
    (tmp_path / "out" / "recipe.yaml").unlink()
    assert verify_checkpoint(tmp_path / "out", tmp_path / "model").errors  # who could know


def test_the_gptq_format_is_read_bit_by_bit(sound, tmp_path):
    """The same codes in another format stand for the same weights."""
    from moeq_plugin.checkpoint.checks.source.stored_weights import stored_weight
    from moeq_plugin.checkpoint.layout import lay_out
    from moeq_plugin.checkpoint.open_checkpoint import open_checkpoint

    path = sound("qwen3_moe")
    gptq = copy_of(path, tmp_path / "gptq")
    to_gptq(gptq)
    one, other = (lay_out(open_checkpoint(p)) for p in (path, gptq))
    assert one.stored.keys() == other.stored.keys()
    for linear in one.present():
        # scales became float16
        torch.testing.assert_close(
            stored_weight(one, linear), stored_weight(other, linear), rtol=1e-2, atol=1e-5
        )


def test_the_report_is_json_with_a_way_out_for_every_finding(sound):
    report = verify_checkpoint(sound("gpt_oss"))
    content = json.loads(json.dumps(report.to_dict()))
    assert content["schema_version"] == 1
    assert content["exit_code"] == 1
    assert all(found["way_out"] and found["check"] in CHECKS for found in content["findings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"target": "onnx"}, "target must be one of"), ({"tp": 0}, "tp must be at least 1")],
)
def test_refuses(arguments, message, sound):
    with pytest.raises(ValueError, match=message):
        verify_checkpoint(sound("mixtral"), **arguments)


def test_refuses_a_directory_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="is not a directory"):
        verify_checkpoint(tmp_path / "no")
    with pytest.raises(ValueError, match=r"config\.json"):
        verify_checkpoint(tmp_path)
