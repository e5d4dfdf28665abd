"""A file is replaced as a whole; a work directory knows what is its own."""

import errno
import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from moeq_plugin.files import work_dir
from moeq_plugin.files.atomic import remove_partial, write_text, write_whole
from moeq_plugin.files.lock import InUseError, held_directory


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("place", range(3))
def test_an_old_file_survives_a_full_disk(place, tmp_path, monkeypatch):
    write_text(tmp_path / "file", "old")
    synced, sync = [], os.fsync

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == place:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)

    def write(path):
        path.write_text("new")
        if place == 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", write)
    # with the name in place and only the directory unsynced, either is whole
    assert (tmp_path / "file").read_text() == ("new" if place == 2 else "old")
    assert names(tmp_path) == ["file"]


def test_partial_files_of_others_stay(tmp_path):
    (tmp_path / "file.partial").write_text("theirs")
    write_text(tmp_path / "file", "ours")
    assert (tmp_path / "file.partial").read_text() == "theirs"


def test_a_link_leads_to_the_file_that_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").symlink_to("there/file")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "new"
    assert names(tmp_path / "there") == ["file"]


def test_a_pipe_is_written_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_the_mask_holds_for_tensors_too(tmp_path):
    before = os.umask(0o027)
    try:
        tensors = {"a": torch.ones(3)}
        write_whole(tmp_path / "a.safetensors", lambda new: save_file(tensors, new))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


OURS = ["run.json", "layer-00000.safetensors", "ebss.jsonl", "ebss.manifest.json"]
PARTIAL = ".layer-00001.safetensors.12-0123abcd.partial"
THEIRS = ["thesis.txt", "layer-00000.safetensors.bak", "model.safetensors.partial", "layer-1"]


def test_only_what_runs_have_made_is_removed(tmp_path):
    for name in [*OURS, PARTIAL, *THEIRS, ".moeq.lock"]:
        (tmp_path / name).write_text("")
    assert work_dir.foreign_files(tmp_path) == sorted(THEIRS)
    work_dir.remove_partial(tmp_path)
    assert PARTIAL not in names(tmp_path)
    work_dir.remove_state(tmp_path, with_directory=True)
    assert names(tmp_path) == sorted(THEIRS)


@pytest.mark.parametrize("name", ["thesis.txt", "model.safetensors.partial"])
def test_a_directory_of_somebody_else_is_refused(name, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=f"holds files of something else .{name}"):
        work_dir.check_work_dir(tmp_path)


def test_state_that_another_process_works_with_stays(tmp_path):
    for name in OURS:
        (tmp_path / name).write_text("")
    with held_directory(tmp_path):
        work_dir.remove_state(tmp_path, with_directory=True)
        with pytest.raises(InUseError):
            held_directory(tmp_path).__enter__()
    assert names(tmp_path) == sorted(OURS)
    work_dir.remove_state(tmp_path, with_directory=True)
    assert not tmp_path.exists()


def test_where_the_file_system_knows_no_locks_the_file_stands_for_one(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with held_directory(tmp_path / "work"):
        second = held_directory(tmp_path / "work")
        with pytest.raises(InUseError, match=r"If none is running, delete .*\.moeq\.lock"):
            second.__enter__()
    assert names(tmp_path) == []


def test_what_a_kill_has_left_beside_a_file_goes_and_nothing_else(tmp_path):
    theirs = [".a.b.12-0123abcd.partial", ".a.12-0123abcd.partial.bak", "a.partial", ".a.partial"]
    for name in ["a", ".a.12-0123abcd.partial", *theirs]:
        (tmp_path / name).write_text("")
    remove_partial(tmp_path / "a")
    assert names(tmp_path) == sorted(["a", *theirs])
