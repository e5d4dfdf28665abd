"""What the commands say of quantized RWKVs: planned to the byte, sound, and counted rightly."""

import json

import pytest
import torch
from helpers import oneshot
from rwkv_models import tiny_rwkv
from typer.testing import CliRunner

pytest.importorskip("llmcompressor")

from transformers import AutoModelForCausalLM

import moeq_plugin.integrations.hf  # noqa: F401
from moeq_plugin import RWKVQuantModifier, SensitivityTable, verify_checkpoint
from moeq_plugin.checkpoint.plan import plan_quantization
from moeq_plugin.checkpoint.presets import scheme_named
from moeq_plugin.cli import app
from moeq_plugin.core.allocation import Allocation
from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.integrations.llm_compressor.allocation.options import parse_option
from moeq_plugin.report.directory import read_directory
from moeq_plugin.report.model_card import model_card
from moeq_plugin.rwkv.tokenizer import RWKVWorldTokenizer

GRID, CODEBOOK = "W4A16_G16", "CB5D2_G32x32"
RECIPES = {
    "grid": {"config_groups": {"g": parse_option(GRID).for_targets(["Linear"])}, "scalar_frac": 1},
    "codebooks": {"codebook": parse_option(CODEBOOK).codebook, "scalar_frac": 0},
    "mixed": {"bits_per_weight": 4.2, "options": [CODEBOOK, GRID, "W8A16_G16"]},
    "elementwise": {
        "codebook": CodebookFormat(3, 1, 16, 32),
        "scalar_frac": 0,
        "elementwise": CodebookFormat(3, 1, group_rows=1, group_columns=32),
    },
}
UNIFORM = {"grid": GRID, "codebooks": CODEBOOK}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return where the source and the result of each version and recipe are, made once."""
    made = {}

    def find(version, name):
        if (version, name) not in made:
            path = tmp_path_factory.mktemp(f"{version}-{name}")
            model = tiny_rwkv(version, vocab_size=128, num_hidden_layers=2)
            model.to(torch.bfloat16).save_pretrained(path / "source")
            loaded = AutoModelForCausalLM.from_pretrained(path / "source")
            oneshot(loaded, RWKVQuantModifier(**RECIPES[name]), output_dir=str(path / "out"))
            made[version, name] = path
        return made[version, name]

    return find


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("version", ["rwkv6", "rwkv7"])
def test_a_sound_checkpoint_raises_no_alarm(version, name, written):
    path = written(version, name)
    report = verify_checkpoint(path / "out", path / "source", target="transformers")
    assert [(f.check, f.where) for f in report.findings] == []


@pytest.mark.parametrize("name", UNIFORM)
@pytest.mark.parametrize("version", ["rwkv6", "rwkv7"])
def test_the_planned_file_is_as_large_as_the_written_one(version, name, written):
    path = written(version, name)
    file = path / "out" / "model.safetensors"

    plan = plan_quantization(path / "source", scheme_named(UNIFORM[name]))

    assert plan.file_bytes == file.stat().st_size
    assert plan.tensor_bytes == read_directory(path / "out").stored.num_bytes
    reasons = set(plan.kept.values())
    assert reasons == {"low-rank factor that feeds a recurrent state", "output embedding"}


@pytest.mark.parametrize("version", ["rwkv6", "rwkv7"])
def test_a_budget_s_bytes_are_those_of_all_tensors(version, written):
    out = written(version, "mixed") / "out"
    table = SensitivityTable.load(out / "moeq_sensitivity.json")
    allocation = Allocation.load(out / "moeq_allocation.json")
    assert len(set(allocation.choice.values())) > 1
    stored = read_directory(out).stored
    # the host writes a weight's shape beside its codes: an option counts it as its own
    assert allocation.num_bytes + table.fixed_bytes == stored.num_bytes


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("version", ["rwkv6", "rwkv7"])
def test_weights_are_counted_however_they_are_stored(version, name, written):
    path = written(version, name)
    found, before = (read_directory(path / of) for of in ("out", "source"))
    assert found.stored.num_weights == before.stored.num_weights
    numbers = {
        key.removesuffix(".weight"): p.numel()
        for key, p in tiny_rwkv(version, vocab_size=128, num_hidden_layers=2).named_parameters()
    }
    quantized = sum(numbers[linear.name] for linear in found.linears)
    assert found.stored.quantized_weights == quantized
    # the record does not count the shapes that stand beside packed codes, 16 bytes each
    shapes = 16 * 8 * sum(linear.scheme.startswith("W") for linear in found.linears)
    bits = found.stored.bits_per_weight - shapes / quantized
    assert bits == pytest.approx(found.bits_per_weight, rel=1e-6)


@pytest.mark.parametrize("name", ["grid", "mixed"])
def test_a_card_shows_only_what_works(name, written):
    card = model_card(read_directory(written("rwkv7", name) / "out"))
    assert "import moeq_plugin.integrations.hf" in card
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "vllm serve" not in card
    assert "--model vllm" not in card
    assert "24 x low-rank factor" not in card  # there are 14 in two layers
    assert "14 x low-rank factor that feeds a recurrent state (`model.blocks.0.att.w1`" in card


@pytest.mark.parametrize("name", ["codebooks", "mixed"])
def test_codebooks_cannot_be_converted_and_the_message_says_why(name, written, tmp_path):
    out = written("rwkv7", name) / "out"
    done = CliRunner().invoke(app, ["convert", str(out), str(tmp_path / "gptq"), "--to", "gptq"])
    assert done.exit_code == 2
    assert "has weights in codebooks, which neither format can hold" in done.output
    assert not (tmp_path / "gptq").exists()


@pytest.mark.parametrize("name", ["codebooks", "mixed"])
def test_a_page_is_written_of_it(name, written, tmp_path):
    out, page = written("rwkv6", name) / "out", tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(out), "--out", str(page)])
    assert done.exit_code == 0, done.output
    assert "codebook" in page.read_text()


def test_it_is_compared_with_its_source(tmp_path):
    model = tiny_rwkv("rwkv7", vocab_size=65536, num_hidden_layers=1).bfloat16()
    model.save_pretrained(tmp_path / "source")
    RWKVWorldTokenizer().save_pretrained(tmp_path / "source")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    oneshot(loaded, RWKVQuantModifier(**RECIPES["codebooks"]), output_dir=str(tmp_path / "out"))
    text, result = tmp_path / "text.txt", tmp_path / "eval.json"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    sizes = ["--seq-len", "16", "--num-sequences", "4", "--text", str(text)]
    both = [str(tmp_path / "source"), str(tmp_path / "out")]
    for number, kept in enumerate(([], ["--reference", str(tmp_path / "kept.safetensors")])):
        out = result.with_name(f"{number}.json")
        done = CliRunner().invoke(app, ["eval", *both, *sizes, *kept, "--json", str(out)])
        assert done.exit_code == 0, done.output
    ours, stored = (json.loads((tmp_path / f"{n}.json").read_text())["texts"]["text"] for n in "01")
    assert 0 < ours["kl"] < 5
    assert stored["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-3)
