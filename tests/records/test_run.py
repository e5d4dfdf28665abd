import json

import pytest

from moeq_plugin.records.run import Basis, LinearRecord, RunRecord, save_records


@pytest.fixture
def record():
    linears = [
        LinearRecord("a", "W4 int symmetric group 128", Basis.OWN, 812.5, 0.25),
        LinearRecord("b", "W4 int symmetric group 128", Basis.SHRUNK, 3.25, 0.5),
        LinearRecord("c", "W4 int symmetric group 128", Basis.LAYER, 0.0, 0.75),
        LinearRecord("d", "W4 int symmetric group 128", Basis.NONE, 4.0, None),
    ]
    return RunRecord(
        "MoEQuantModifier", {"seed": 0}, {"torch": "2"}, linears, ["a limit"], {"r": "router"}
    )


def test_what_is_saved_is_what_is_loaded(record, tmp_path):
    other = RunRecord("Other", {}, {})
    save_records([record, other], tmp_path)
    assert RunRecord.load(tmp_path) == [record, other]


def test_the_summary_names_every_fallback_and_the_worst_expert(record):
    assert record.summary(5) == (
        "quantized 4 of 5 linears, 1 on Hessians mixed with the layer's, 1 on the layer's "
        "alone, 1 rounded to nearest; fewest effective tokens 0.0 (c)"
    )


def test_a_summary_of_nothing_is_no_error():
    assert RunRecord("m", {}, {}).summary(3).startswith("quantized 0 of 3 linears")


def test_another_schema_version_is_refused(record, tmp_path):
    path = save_records([record], tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema version 99, this package reads 1"):
        RunRecord.load(tmp_path)
