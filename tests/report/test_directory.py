import pytest
from written_checkpoint import record, write_checkpoint

from moeq_plugin.records.run import save_records
from moeq_plugin.report.directory import read_directory


def test_everything_that_is_there_is_read(tmp_path):
    found = read_directory(write_checkpoint(tmp_path))
    assert found.records == [record()]
    assert found.quality.worst_text == "code"
    assert found.table["options"] == ["W2A16", "W4A16", "W8A16"]
    assert found.allocation["target"] == "linear"
    assert found.stored.quantized_weights == 512
    assert found.config["num_experts"] == 8
    assert found.model == "someone/some-moe"
    assert found.problems == []


def test_what_is_missing_is_a_gap(tmp_path):
    save_records([record()], tmp_path)
    found = read_directory(tmp_path)
    assert (found.table, found.allocation, found.quality, found.stored) == (None,) * 4
    assert found.problems == []
    assert found.bits_per_weight is None


FILES = [
    "moeq_run.json",
    "moeq_eval.json",
    "moeq_allocation.json",
    "moeq_sensitivity.json",
    "model.safetensors",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", ["{broken", "[1, 2]", "{}"])
def test_what_is_broken_is_a_gap_with_a_sentence(tmp_path, name, content):
    write_checkpoint(tmp_path)
    (tmp_path / name).write_text(content)

    found = read_directory(tmp_path)

    assert len(found.problems) == 1
    assert "could not be read" in found.problems[0]


def test_an_evaluation_may_lie_elsewhere(tmp_path):
    write_checkpoint(tmp_path / "a")
    (tmp_path / "a" / "moeq_eval.json").rename(tmp_path / "e.json")
    assert read_directory(tmp_path / "a").quality is None
    assert read_directory(tmp_path / "a", evaluation=tmp_path / "e.json").quality is not None


def test_bits_come_from_who_knows_them_best(tmp_path):
    found = read_directory(write_checkpoint(tmp_path))
    assert found.bits_per_weight == found.stored.bits_per_weight == 8 * 304 / 512
    found.stored = None
    assert found.bits_per_weight == found.allocation["bits_per_weight"]
    found.records[0].bits_per_weight = 3.5
    assert found.bits_per_weight == 3.5


def test_other_directories_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither moeq_run.json nor config.json"):
        read_directory(tmp_path)
    with pytest.raises(ValueError, match="none is not a directory"):
        read_directory(tmp_path / "none")
    with pytest.raises(ValueError, match="no.json is not a file"):
        read_directory(write_checkpoint(tmp_path), evaluation=tmp_path / "no.json")
