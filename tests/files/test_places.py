"""The places of one command: apart, or refused before anything is done."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from moeq_plugin.files.places import check_new_file, check_places
from moeq_plugin.files.room import check_room


@pytest.fixture
def places(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "data.jsonl").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "to_empty").symlink_to("empty")
    return tmp_path


@pytest.mark.parametrize(
    ("out", "work"),
    [
        ("out", "out"),
        ("out", "."),
        ("out", "out/work"),
        ("a/b/out", "a"),
        ("out", "x/../out"),
        ("to_empty", "empty"),
        ("empty/out", "to_empty"),
    ],
)
def test_what_is_made_is_apart(out, work, places):
    with pytest.raises(ValueError, match=r"OUT .* and --work-dir .* must be apart"):
        check_places(reads={}, makes={"OUT": places / out, "--work-dir": places / work})


@pytest.mark.parametrize(
    ("made", "read"),
    [
        ("model", "model"),
        (".", "model"),
        ("link", "model"),
        ("model", "link"),
        ("data.jsonl", "data.jsonl"),
        (".", "data.jsonl"),
        ("model/config.json", "link/config.json"),
    ],
)
def test_nothing_is_made_where_something_is_read(made, read, places):
    with pytest.raises(ValueError, match="would replace or remove READ"):
        check_places(reads={"READ": places / read}, makes={"MADE": places / made})


def test_a_hard_link_is_the_same_file(places):
    os.link(places / "data.jsonl", places / "other.jsonl")
    with pytest.raises(ValueError, match="would replace"):
        check_places(reads={"READ": places / "data.jsonl"}, makes={"X": places / "other.jsonl"})


@pytest.mark.parametrize(
    ("made", "read"), [("model/new", "model"), ("out", "model"), ("model2", "model")]
)
def test_a_new_place_in_or_beside_what_is_read_is_fine(made, read, places):
    check_places(reads={"READ": places / read, "none": None}, makes={"MADE": places / made})


def test_links_in_a_circle_are_refused(places):
    (places / "a").symlink_to("b")
    (places / "b").symlink_to("a")
    with pytest.raises(ValueError, match="leads nowhere"):
        check_places(reads={}, makes={"OUT": places / "a"})


def test_a_file_replaces_only_an_earlier_one_of_its_kind(places):
    def is_ours(path):
        if path.read_text() == "broken":
            raise ValueError("broken")
        return path.read_text() == "ours"

    for text, is_fine in {"ours": True, "theirs": False, "broken": False}.items():
        (places / "file").write_text(text)
        if is_fine:
            check_new_file("--json", places / "file", is_ours)
        else:
            with pytest.raises(ValueError, match="is not an earlier result"):
                check_new_file("--json", places / "file", is_ours)
    check_new_file("--json", places / "new", is_ours)
    check_new_file("--json", None, is_ours)
    check_new_file("--json", Path("/dev/null"), is_ours)
    with pytest.raises(ValueError, match="is a directory"):
        check_new_file("--json", places / "model", is_ours)
    with pytest.raises(ValueError, match="is not a directory that may be written"):
        check_new_file("--json", places / "no" / "file", is_ours)
    check_new_file("OUT", places / "no" / "file", is_ours, makes_parents=True)


def test_room_is_counted_per_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    check_room({tmp_path / "out": 60, tmp_path / "work": 40})
    with pytest.raises(ValueError, match=r"no room for .*work: .* are free, at least"):
        check_room({tmp_path / "out": 60, tmp_path / "work": 41})
