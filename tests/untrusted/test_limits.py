"""Files of strangers may have so much of everything and no more; what is just within is read."""

import json
import os
from types import SimpleNamespace

import pytest
from strangers import write_checkpoint

from moeq_plugin import verify_checkpoint
from moeq_plugin.checkpoint import headers, layout
from moeq_plugin.checkpoint.headers import read_header
from moeq_plugin.untrusted import reading
from moeq_plugin.untrusted.broken import UnreadableFileError
from moeq_plugin.untrusted.patterns import (
    _READERS_WAYS_IN_ALL,
    MAX_NAME,
    MAX_PATTERN,
    check_content,
    check_for_readers,
    compiled,
)
from moeq_plugin.untrusted.reading import read_bounded, read_json


def write_header(path, content, length=None):
    text = json.dumps(content).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text)
    return len(text)


def tensor(shape=(0,)):
    return {"dtype": "I8", "shape": list(shape), "data_offsets": [0, 0]}


def test_bytes_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 10)
    assert read_bounded(tmp_path / "file", 10) == b"x" * 10
    with pytest.raises(UnreadableFileError, match="10 bytes are more than the 9"):
        read_bounded(tmp_path / "file", 9)


def test_bytes_of_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x" * 20)
    before = os.stat_result((tmp_path / "file").stat())
    look = SimpleNamespace(st_mode=before.st_mode, st_size=5)
    monkeypatch.setattr(os, "fstat", lambda _: look)
    with pytest.raises(UnreadableFileError, match="11 bytes are more than the 10"):
        read_bounded(tmp_path / "file", 10)


def test_depth(tmp_path):
    path = tmp_path / "config.json"
    for depth, is_read in ((reading._MAX_DEPTH, True), (reading._MAX_DEPTH + 1, False)):
        path.write_text('{"a":' * depth + "1" + "}" * depth)
        if is_read:
            assert "a" in read_json(path)
        else:
            with pytest.raises(UnreadableFileError, match="nested more than"):
                read_json(path)


def test_objects_and_lists(tmp_path, monkeypatch):
    """They take fifty times the room in memory that they take in the file."""
    monkeypatch.setattr(reading, "_MAX_CONTAINERS", 10)
    (tmp_path / "config.json").write_text(json.dumps({"a": [[]] * 8}))
    read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"a": [[]] * 9}))
    with pytest.raises(UnreadableFileError, match="more than 10 objects and lists"):
        read_json(tmp_path / "config.json")


def test_a_header(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    length = write_header(path, {"a": tensor()})
    monkeypatch.setattr(headers, "MAX_HEADER_BYTES", length)
    assert [found.name for found in read_header(path)] == ["a"]
    monkeypatch.setattr(headers, "MAX_HEADER_BYTES", length - 1)
    with pytest.raises(UnreadableFileError, match=f"the header is to have {length} bytes"):
        read_header(path)


def test_a_header_that_claims_more_than_there_is(tmp_path):
    path = tmp_path / "model.safetensors"
    length = write_header(path, {"a": tensor()}, length=50_000_000)
    with pytest.raises(UnreadableFileError, match=f"the file has {length + 8} in all"):
        read_header(path)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("a" * MAX_NAME, [1 << 47, 0], None),
        ("a" * (MAX_NAME + 1), [0], f"a name has {MAX_NAME + 1} characters"),
        ("a", [1 << 48, 0], "no known dtype, shape or offsets"),
        ("a", [0] * 9, "no known dtype, shape or offsets"),
        ("a", [-1, 0], "no known dtype, shape or offsets"),
        ("a", [True, 0], "no known dtype, shape or offsets"),
    ],
)
def test_a_tensor(name, shape, message, tmp_path):
    path = tmp_path / "model.safetensors"
    write_header(path, {name: tensor(shape)})
    if message is None:
        assert len(read_header(path)) == 1
        return
    with pytest.raises(UnreadableFileError, match=message):
        read_header(path)


def test_characters_of_a_pattern():
    assert compiled("a" * MAX_PATTERN).match("a") is None
    with pytest.raises(ValueError, match=f"at most {MAX_PATTERN}"):
        compiled("a" * (MAX_PATTERN + 1))


def test_ways_of_all_patterns_together():
    """Each would be read alone."""
    pattern = ".*x.*y.*z.*"
    few = _READERS_WAYS_IN_ALL // check_for_readers(pattern)
    assert few < 10_000
    check_content({"ignore": [f"re:{pattern}"] * few})
    with pytest.raises(ValueError, match="in more than"):
        check_content({"ignore": [f"re:{pattern}"] * (few + 1)})


def test_comparisons_of_patterns_with_names():
    layout._check_size(50, layout._MAX_COMPARISONS // 50)
    with pytest.raises(ValueError, match="more than can be compared"):
        layout._check_size(51, layout._MAX_COMPARISONS // 50)


def test_they_are_counted_before_they_are_made(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr(layout, "_MAX_COMPARISONS", -1)
    with pytest.raises(ValueError, match="more than can be compared"):
        verify_checkpoint(checkpoint)
