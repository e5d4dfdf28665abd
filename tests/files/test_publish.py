"""A directory appears complete or not at all, and nothing of others is touched on the way."""

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from moeq_plugin.files import disk
from moeq_plugin.files import stage as stage_module
from moeq_plugin.files.lock import InUseError, held_directory, locked
from moeq_plugin.files.publish import joined, staged
from moeq_plugin.files.stage import published_as

PUBLISHERS = pytest.mark.parametrize("publish", [staged, joined])


def fill(stage, **files):
    for name, text in ({"config.json": "{}", "model.safetensors": "new"} | files).items():
        (stage / name).write_text(text)


def tree(directory):
    """Everything below a directory: files with their content, directories and links."""
    return {
        str(path.relative_to(directory)): path.read_text() if path.is_file() else None
        for path in directory.rglob("*")
    }


@PUBLISHERS
@pytest.mark.parametrize("is_there", [False, True])
def test_it_appears_at_the_end(publish, is_there, tmp_path):
    out = tmp_path / "out"
    if is_there:
        out.mkdir()
    with publish(out) as stage:
        assert (stage.name, published_as(stage)) == ("out", out)
        fill(stage)
        assert out.exists() is is_there and not (is_there and any(out.iterdir()))
    assert tree(tmp_path) == {"out": None, "out/config.json": "{}", "out/model.safetensors": "new"}


@PUBLISHERS
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_what_failed(publish, error, tmp_path):
    with pytest.raises(error), publish(tmp_path / "out") as stage:
        fill(stage)
        raise error
    assert tree(tmp_path) == {}


@PUBLISHERS
def test_a_link_leads_to_the_directory_that_is_meant(publish, tmp_path):
    (tmp_path / "disk" / "place").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "place")
    with publish(tmp_path / "out") as stage:
        fill(stage)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "out" / "config.json").exists()
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["place"]


def test_a_link_to_another_disk(tmp_path):
    """As F02: the rename at the end has to stay within that disk."""
    other = Path("/dev/shm")
    if not os.access(other, os.W_OK) or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk")
    place = Path(tempfile.mkdtemp(dir=other))
    try:
        (tmp_path / "out").symlink_to(place)
        with staged(tmp_path / "out") as stage:
            fill(stage)
        assert sorted(p.name for p in place.iterdir()) == ["config.json", "model.safetensors"]
    finally:
        shutil.rmtree(place)


@contextmanager
def mounted(directory):
    """A disk of 8 MB in memory at a directory; it takes a person who may mount."""
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_a_mount_point_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "a b").mkdir()
    with mounted(tmp_path / "a b"):
        assert disk.is_mount_point(tmp_path / "a b")
        with pytest.raises(ValueError, match="is a mount point.*a b/checkpoint"):
            staged(tmp_path / "a b").__enter__()
        with staged(tmp_path / "a b" / "checkpoint") as stage:
            fill(stage)
        assert (tmp_path / "a b" / "checkpoint" / "config.json").exists()


def test_a_directory_mounted_within_its_file_system(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    line = rf"99 1 0:1 /from {tmp_path}/o\165t rw - ext4 /dev/sda rw"
    (tmp_path / "mounts").write_text(line.replace("\\165", "u") + "\n")
    monkeypatch.setattr(disk, "_MOUNTS", tmp_path / "mounts")
    with pytest.raises(ValueError, match="is a mount point"):
        staged(tmp_path / "out").__enter__()


def test_a_model_is_saved_to_a_mount_point_all_the_same(tmp_path):
    (tmp_path / "out").mkdir()
    with mounted(tmp_path / "out"):
        with joined(tmp_path / "out") as stage:
            fill(stage)
        assert tree(tmp_path / "out") == {"config.json": "{}", "model.safetensors": "new"}


def test_the_current_directory_is_not_replaced_under_a_person(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is the current directory"):
        staged(tmp_path).__enter__()


def test_a_relative_path_means_where_the_run_began(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with staged(Path("out")) as stage:
        os.chdir("elsewhere")
        fill(stage)
    assert (tmp_path / "out" / "config.json").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_directory_with_files_is_refused(tmp_path):
    (tmp_path / "theirs.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not empty; nothing was written"):
        staged(tmp_path).__enter__()
    assert tree(tmp_path) == {"theirs.txt": "precious"}


@pytest.mark.parametrize("is_file", [False, True])
def test_what_appears_meanwhile_stays_and_the_result_is_kept_beside_it(is_file, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OSError, match="the checkpoint is complete in .*out-3"):  # noqa: SIM117
        with staged(out) as stage:
            fill(stage)
            (tmp_path / "out-2").mkdir()
            if is_file:
                out.write_text("theirs")
            else:
                out.mkdir()
                (out / "x.safetensors").write_text("theirs")
    there = {"out": "theirs"} if is_file else {"out": None, "out/x.safetensors": "theirs"}
    new = {"out-3": None, "out-3/config.json": "{}", "out-3/model.safetensors": "new"}
    assert tree(tmp_path) == {**there, "out-2": None, **new}


def test_an_output_that_was_removed_meanwhile_is_made(tmp_path):
    (tmp_path / "out").mkdir()
    with staged(tmp_path / "out") as stage:
        fill(stage)
        (tmp_path / "out").rmdir()
    assert (tmp_path / "out" / "config.json").exists()


def test_a_model_is_saved_beside_a_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("theirs")
    with joined(tmp_path) as stage:
        fill(stage)
    files = {"config.json": "{}", "model.safetensors": "new", "tokenizer.json": "theirs"}
    assert tree(tmp_path) == files


@pytest.mark.parametrize("name", ["config.json", "old-00001-of-00002.safetensors"])
def test_no_earlier_checkpoint_is_replaced(name, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("old")
    with pytest.raises(OSError, match=f"it holds {name}.*complete in .*out/out-2"):  # noqa: SIM117
        with joined(out) as stage:
            fill(stage)
    assert (out / name).read_text() == "old"
    assert (out / "out-2" / "model.safetensors").read_text() == "new"


def test_a_temporary_directory_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds files of something else"):
        staged(tmp_path / "out").__enter__()
    assert tree(tmp_path) == {".out.partial": None, ".out.partial/thesis.txt": "precious"}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007, 0o002])
def test_modes_are_what_the_mask_gives(mask, tmp_path):
    before = os.umask(mask)
    try:
        with staged(tmp_path / "out") as stage:
            fill(stage)
            (stage / "model.safetensors").chmod(0o600)  # as safetensors leaves it
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


def test_an_empty_directory_keeps_the_mode_that_its_owner_gave_it(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o2770)
    with staged(tmp_path / "out") as stage:
        fill(stage)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o2770


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, sync, rename = [], os.fsync, Path.rename

    def noting(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def renaming(self, target):
        inodes = {p.stat().st_ino for p in (self, *self.rglob("*"))}
        assert inodes <= set(synced)
        synced.clear()
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(Path, "rename", renaming)
    with staged(tmp_path / "out") as stage:
        (stage / "deep").mkdir()
        fill(stage, **{"deep/more": "text"})
    assert synced == [tmp_path.stat().st_ino]  # and then the name


HOLD = """
import sys, time
from pathlib import Path
from moeq_plugin.files.publish import staged
with staged(Path(sys.argv[1])) as stage:
    (stage / "half").write_text("written")
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that is writing ``out``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_two_processes_do_not_write_one_directory(holder, tmp_path):
    before = tree(tmp_path)
    with pytest.raises(InUseError, match="is in use by another process"):
        staged(tmp_path / "out").__enter__()
    assert tree(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_process_leaves_no_lock(number, holder, tmp_path):
    os.kill(holder.pid, number)
    holder.wait()
    with staged(tmp_path / "out") as stage:
        assert list(stage.iterdir()) == []
        fill(stage)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_lock_on_a_file_that_has_lost_its_name_is_none(tmp_path, monkeypatch):
    """Between opening and locking its holder may end, remove it, and another may make a new one."""
    file, flock, times = tmp_path / "lock", fcntl.flock, []

    def ended_meanwhile(descriptor, how):
        times.append(1)
        if len(times) == 1:
            file.unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", ended_meanwhile)
    with locked(file, tmp_path):
        assert len(times) == 2
        with pytest.raises(InUseError):
            locked(file, tmp_path).__enter__()


def test_whoever_comes_late_to_a_place_looks_at_it_again(tmp_path, monkeypatch):
    """What another published between the first look and the lock is found before calibration."""

    @contextmanager
    def published_meanwhile(directory):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("theirs")
        with held_directory(directory):
            yield

    monkeypatch.setattr(stage_module, "held_directory", published_meanwhile)
    with pytest.raises(ValueError, match="is not empty; nothing was written"):
        staged(tmp_path / "out").__enter__()
    assert tree(tmp_path) == {"out": None, "out/config.json": "theirs"}


RACE = """
import sys, time
from pathlib import Path
from moeq_plugin.files.publish import staged
time.sleep(max(0, float(sys.argv[2]) - time.time()))
try:
    with staged(Path(sys.argv[1])) as stage:
        (stage / "config.json").write_text(sys.argv[3])
except (ValueError, OSError) as error:
    print(type(error).__name__, error)
    assert "in use" in str(error) or "is not empty" in str(error), error
    sys.exit(2)
"""


def test_of_many_that_start_at_once_one_wins_and_all_know(tmp_path):
    for round_ in range(3):
        out, start = tmp_path / f"out{round_}", time.time() + 1.0
        command = [sys.executable, "-c", RACE, str(out), str(start)]
        racers = [subprocess.Popen([*command, str(number)]) for number in range(6)]
        codes = [racer.wait() for racer in racers]
        winners = [str(number) for number, code in enumerate(codes) if code == 0]
        assert set(codes) <= {0, 2} and len(winners) == 1
        assert tree(out) == {"config.json": winners[0]}
    assert len(list(tmp_path.iterdir())) == 3
