"""Sensitivities that were measured before a kill are taken over, and nothing is measured twice."""

import random
import shutil

import pytest
from test_kept_state import flip_bit
from test_resume import digest, run

pytest.importorskip("llmcompressor")

from datasets import Dataset
from helpers import tiny_model, tokens

from moeq_plugin import SensitivityTable
from moeq_plugin.files.work_dir import holds_progress
from moeq_plugin.integrations.llm_compressor import kept_parts
from moeq_plugin.integrations.llm_compressor.allocation import sensitivity
from moeq_plugin.integrations.llm_compressor.allocation.trial_rounding import TrialRounding

LAYERS = 3
BUDGET = {
    "config_groups": None,
    "bits_per_weight": 5.0,
    "options": ["W3A16_G32", "W4A16_G32", "W8A16_G32"],
    "target": "linear",
    # undercovered linears change the choice: they are kept too
    "sensitivity": {"interactions": True, "undercovered_tokens": 24, "gradient_tokens": 256},
    "data": Dataset.from_dict({"input_ids": tokens(12, 24).tolist(), "domain": [0, 1] * 6}),
}
NAMES = ["gradients-00000", *(f"measured-{number:05d}" for number in range(LAYERS))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with all that it has kept."""
    path = tmp_path_factory.mktemp("measured")
    tiny_model("qwen3_moe", path / "model", num_hidden_layers=LAYERS)
    run(path / "model", path / "out", path / "work", **BUDGET)
    return path


def killed_while_measuring(finished, work, num_layers):
    """Leave what a process that was killed would have left."""
    shutil.copytree(finished / "work", work)
    for path in work.iterdir():
        if path.stem not in {"run", *NAMES[: num_layers + 1]}:
            path.unlink()
    return work


def test_all_is_kept_layer_by_layer(finished):
    kept = {path.name for path in (finished / "work").glob("*.safetensors")}
    layers = {f"layer-{number:05d}.safetensors" for number in range(LAYERS)}
    assert kept == layers | {f"{name}.safetensors" for name in NAMES}


@pytest.mark.parametrize("num_layers", range(LAYERS + 1))
def test_what_was_measured_is_not_measured_again(num_layers, finished, tmp_path, monkeypatch):
    work = killed_while_measuring(finished, tmp_path / "work", num_layers)
    rounded, differences = set(), TrialRounding.differences

    def noting(self, option, moments):
        for linear, difference in differences(self, option, moments):
            rounded.add(linear)
            yield linear, difference

    monkeypatch.setattr(TrialRounding, "differences", noting)
    monkeypatch.setattr(sensitivity, "measure_row_weights", lambda *_, **__: pytest.fail("again"))
    run(finished / "model", tmp_path / "out", work, **BUDGET)
    of_a_layer = 4 + 3 * 4  # attention and experts
    assert len(rounded) == (LAYERS - num_layers) * of_a_layer
    assert digest(tmp_path / "out") == digest(finished / "out")
    for name in ("moeq_sensitivity.json", "moeq_allocation.json"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / "out" / name).read_bytes()


def test_the_table_has_what_could_be_lost(finished):
    """Else the test above would not see that it is kept."""
    table = SensitivityTable.load(finished / "out" / "moeq_sensitivity.json")
    assert (len(table.interactions), len(table.domains)) == (LAYERS, 2)
    assert table.undercovered


@pytest.mark.parametrize("number", range(LAYERS))
def test_stopped_while_measuring_it_goes_on(number, finished, tmp_path, monkeypatch):
    def stop(self, *given):
        stop.calls += 1
        if stop.calls > number:
            raise KeyboardInterrupt
        return differences(self, *given)

    stop.calls, differences = -1, sensitivity.Measurement.finish_layer
    with monkeypatch.context() as patched:
        patched.setattr(sensitivity.Measurement, "finish_layer", stop)
        with pytest.raises(KeyboardInterrupt):
            run(finished / "model", tmp_path / "out", tmp_path / "work", **BUDGET)
    assert holds_progress(tmp_path / "work")
    kept = sorted(path.stem for path in (tmp_path / "work").glob("*.safetensors"))
    assert kept == NAMES[: number + 1]
    run(finished / "model", tmp_path / "out", tmp_path / "work", **BUDGET)
    assert digest(tmp_path / "out") == digest(finished / "out")


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_refused_by_the_name_of_the_file(name, finished, tmp_path):
    rng = random.Random(name)
    for number in range(6):
        work = killed_while_measuring(finished, tmp_path / f"work{number}", LAYERS)
        path = work / f"{name}.safetensors"
        size = path.stat().st_size
        flip_bit(path, rng.randrange(size // (2 if number % 2 else 1)), rng.randrange(8))
        with pytest.raises(ValueError, match=f"{name}.safetensors was changed after it had been k"):
            run(finished / "model", tmp_path / "out", work, **BUDGET)
        assert not (tmp_path / "out").exists()


def test_measurements_of_another_place_or_run_are_refused(finished, tmp_path):
    first, second = (f"{name}.safetensors" for name in NAMES[1:3])
    work = killed_while_measuring(finished, tmp_path / "swapped", LAYERS)
    shutil.copy(finished / "work" / second, work / first)
    with pytest.raises(ValueError, match=f"{first} was changed"):
        run(finished / "model", tmp_path / "out", work, **BUDGET)

    work = killed_while_measuring(finished, tmp_path / "gone", LAYERS)
    (work / first).unlink()
    with pytest.raises(ValueError, match=f"{first} is not there any more"):
        run(finished / "model", tmp_path / "out", work, **BUDGET)

    run(finished / "model", tmp_path / "other", tmp_path / "work", **{**BUDGET, "seed": 1})
    work = killed_while_measuring(finished, tmp_path / "foreign", LAYERS)
    shutil.copy(tmp_path / "work" / first, work / first)
    with pytest.raises(ValueError, match=f"{first} was changed"):
        run(finished / "model", tmp_path / "out", work, **BUDGET)


def test_a_full_disk_while_measuring_loses_nothing(finished, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    work = killed_while_measuring(finished, tmp_path / "work", 1)
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    with monkeypatch.context() as disk:
        disk.setattr(kept_parts, "write_whole", full)
        with pytest.raises(OSError, match=r"measured-00001.*No space left.*kept before is sound"):
            run(finished / "model", tmp_path / "out", work, **BUDGET)
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before
    run(finished / "model", tmp_path / "out", work, **BUDGET)
    assert digest(tmp_path / "out") == digest(finished / "out")
