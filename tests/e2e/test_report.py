"""What a quantized checkpoint says of itself, from the run to the card and the page."""

import pytest
from helpers import int4, oneshot, tiny_model
from typer.testing import CliRunner

pytest.importorskip("llmcompressor")
pytest.importorskip("plotly")

from moeq_plugin import MoEQuantModifier
from moeq_plugin.cli import app
from moeq_plugin.report.directory import read_directory

SCALE_BITS = 32  # the model is float32, and so are its scales


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    model = tiny_model("mixtral", directory / "model")
    settings = {"ebss": {"num_sequences": 4, "seq_len": 32}}
    oneshot(model, MoEQuantModifier(config_groups=int4(32), **settings))
    model.save_pretrained(directory / "quant")
    return directory / "quant"


def test_bits_and_sizes_are_those_of_the_files(saved):
    found = read_directory(saved)
    # 4 bit and one 16-bit scale per 32 weights, two 8-byte numbers for the shape of each linear
    weights = found.stored.quantized_weights
    shapes = 16 * 8 * len(found.linears)
    assert found.stored.bits_per_weight == pytest.approx(4 + SCALE_BITS / 32 + shapes / weights)
    assert found.stored.num_bytes < (saved / "model.safetensors").stat().st_size


def test_the_card_beside_the_weights_has_what_the_run_knows(saved):
    card = (saved / "README.md").read_text()
    assert "# quant" in card
    assert f"| {len(read_directory(saved).linears)} | W4 symmetric group 32 |" in card
    assert "Effective tokens of an expert: at least" in card
    assert "vllm serve quant" in card


def test_a_report_is_made_of_it(saved):
    done = CliRunner().invoke(app, ["report", str(saved)])
    assert done.exit_code == 0, done.output
    text = (saved / "report.html").read_text()
    assert 'id="chart-effective-tokens"' in text
    assert 'id="chart-losses"' in text
