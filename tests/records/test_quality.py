import json
import math

import pytest
from written_checkpoint import quality, text

from moeq_plugin.records.quality import QualityRecord, TaskScore


def test_what_is_saved_is_what_is_loaded(tmp_path):
    quality().save(tmp_path / "q.json")
    assert QualityRecord.load(tmp_path / "q.json") == quality()


def test_what_is_not_a_number_becomes_null(tmp_path):
    record = QualityRecord("a", "b", {}, {}, {"t": {**text(0.1), "kl_stderr": math.nan}})
    record.save(tmp_path / "q.json")
    assert json.loads((tmp_path / "q.json").read_text())["texts"]["t"]["kl_stderr"] is None


def test_recovery_is_what_is_left_whichever_way_is_better():
    assert TaskScore("t", "acc", True, 0.5, None, 0.4, None).recovery == pytest.approx(0.8)
    assert TaskScore("t", "ppl", False, 8.0, None, 10.0, None).recovery == pytest.approx(0.8)
    assert TaskScore("t", "acc", True, 0.0, None, 0.4, None).recovery is None


def test_the_worst_are_those_with_most_kl_and_least_left():
    assert quality().worst_text == "code"
    assert quality().worst_task.task == "hard"
    assert QualityRecord("a", "b", {}, {}).worst_text is None
    assert QualityRecord("a", "b", {}, {}).worst_task is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"schema_version": 2}', '{"schema_version": 1}']
)
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(ValueError, match=r"q\.json is not a record of `moeq eval`"):
        QualityRecord.load(tmp_path / "q.json")
