"""A data set is read as far as it is needed, and no further."""

import json

import pytest

from moeq_plugin.files.datasets import read_dataset

pytest.importorskip("datasets")


def test_what_follows_the_rows_that_are_needed_is_not_read(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"text": f"row {number}"} for number in range(3)]
    path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\nno JSON")
    assert read_dataset(path, 3).to_list() == rows
    assert read_dataset(path, 2).to_list() == rows[:2]
    with pytest.raises(ValueError, match="JSON lines"):
        read_dataset(path, 4)


def test_rows_may_have_different_columns(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b", "source": "c"}\n')
    assert read_dataset(path, 9).to_list() == [
        {"text": "a", "source": None},
        {"text": "b", "source": "c"},
    ]


@pytest.mark.parametrize("content", ["", "\n", "[1]", '"text"', "{", "\xff"])
def test_what_is_no_data_set_is_refused(content, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match="JSON lines with `text` or `input_ids`"):
        read_dataset(path, 4)


@pytest.mark.parametrize("rows", [0, -3])
def test_at_least_one_row_is_asked_for(rows, tmp_path):
    with pytest.raises(ValueError, match="at least 1 row"):
        read_dataset(tmp_path / "data.jsonl", rows)


def test_no_path_is_no_data_set(tmp_path):
    assert read_dataset(None, 4) is None
    with pytest.raises(ValueError, match="is not a file"):
        read_dataset(tmp_path / "absent", 4)
