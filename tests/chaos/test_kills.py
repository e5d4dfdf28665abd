"""Runs that are killed, whose disk is full or whose state is damaged, and two in one place.

Each ends with the file that an undisturbed run makes, with a refusal in a sentence, or leaves what
was there before. MOEQ_CHAOS_KILLS sets how often; the seed is printed with every failure.
"""

import errno
import os
import random
import shutil
import signal
import time
from functools import cache

import pytest

pytest.importorskip("llmcompressor")

from chaos_runs import (
    IN_PYTHON,
    KILLS,
    LAYERS,
    MODES,
    Place,
    digest,
    kill,
    said,
    start,
    wait,
    write_sources,
)

import moeq_plugin.cli  # noqa: F401 - before the fork
import moeq_plugin.integrations.llm_compressor  # noqa: F401 - likewise
from moeq_plugin.files.lock import LOCK_FILE
from moeq_plugin.files.sealed import SealedFile
from moeq_plugin.files.work_dir import holds_progress
from moeq_plugin.integrations.llm_compressor.moequant.run_state import RunState

pytestmark = pytest.mark.slow
SEED = int(os.environ.get("MOEQ_CHAOS_SEED", "0"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    source = write_sources(tmp_path_factory.mktemp("source"))
    place = Place(source, source / "packed", source / "packed.work")
    assert wait(start("data", place)) == 0, said(place)
    return source


@pytest.fixture(scope="module")
def undisturbed(source):
    """The digest that a mode ends with, and how long it takes."""

    @cache
    def run(mode):
        place = at(source, source, mode, "whole")
        began = time.monotonic()
        assert wait(start(mode, place)) == 0, said(place)
        return digest(place), time.monotonic() - began

    return run


def at(source, directory, mode, name):
    ending = ".jsonl" if mode == "sample" else ""
    return Place(source, directory / f"{name} {mode}{ending}", directory / f"{name} {mode}.work")


def finish(mode, place, wanted):
    """Run until the end; what failed before may be in the way of nothing."""
    expected = {f"{place.out.name}.said", place.work.name}
    if mode == "sample" or not place.out.exists():
        assert wait(start(mode, place)) == 0, said(place)
    elif (stage := place.out.with_name(f".{place.out.name}.partial")).exists():
        # killed after the checkpoint got its name: nobody was left to remove where it had been made
        assert {path.name for path in stage.iterdir()} <= {LOCK_FILE}
        expected.add(stage.name)
    assert digest(place) == wanted
    left = {p.name for p in place.out.parent.iterdir()} - {place.out.name}
    manifest = {place.out.with_suffix(".manifest.json").name} if mode == "sample" else set()
    assert left - manifest <= expected, left


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_random_moments_it_ends_in_the_same_file(mode, source, undisturbed, tmp_path):
    wanted, duration = undisturbed(mode)
    rng = random.Random(f"{SEED} {mode}")
    for number in range(KILLS):
        directory = tmp_path / str(number)
        directory.mkdir()
        place = at(source, directory, mode, "out")
        for _ in range(rng.choice([1, 1, 2])):  # some are killed again when they go on
            child = start(mode, place)
            time.sleep(rng.uniform(0.05, 1.0) * duration)
            kill(child, rng.choice)
            if place.out.exists() and mode != "sample":
                assert digest(place) == wanted, f"seed {SEED}: half a checkpoint has its name"
                break
        finish(mode, place, wanted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("mode", ["data", "sample"])
def test_stopped_by_a_signal_it_ends_in_the_same_file(mode, number, source, undisturbed, tmp_path):
    wanted, duration = undisturbed(mode)
    place = at(source, tmp_path, mode, "out")
    child = start(mode, place)
    time.sleep(0.5 * duration)
    os.kill(child, number)
    assert wait(child) in {0, 130, -signal.SIGTERM}, said(place)
    assert "Traceback" not in said(place)
    finish(mode, place, wanted)


def full_at(write):
    """Let the disk be full when a file is to be brought to it, for the ``write``-th time."""
    synced, sync = [], os.fsync

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == write:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    os.fsync = full
    return synced


@pytest.mark.parametrize("mode", ["data", "own text", "budget", "convert", "sample"])
def test_a_disk_that_is_full_at_any_write(mode, source, undisturbed, tmp_path):
    wanted, _ = undisturbed(mode)
    writes = range(1, 60) if KILLS > 2 else random.Random(f"{SEED} {mode}").sample(range(1, 16), 2)
    for write in writes:
        directory = tmp_path / str(write)
        directory.mkdir()
        place = at(source, directory, mode, "out")
        code = wait(start(mode, place, lambda write=write: full_at(write)))
        assert code in {0, 2}, (write, said(place))
        assert "Traceback" not in said(place)
        if code:
            assert "No space left" in said(place)
        elif place.out.exists() and mode != "sample":
            assert digest(place) == wanted  # it was full when nothing depended on it any more
        finish(mode, place, wanted)


def stop_after(layers):
    """Let a run be interrupted once some layers are kept."""
    keep, kept = RunState.keep_noted, []

    def stop(self):
        if len(kept) == layers:
            raise KeyboardInterrupt
        kept.append(1)
        keep(self)

    RunState.keep_noted = stop


def stop_before_the_table():
    """Let a run be interrupted when all is measured, and no table of it is written yet."""

    def stop(*_):
        raise KeyboardInterrupt

    SealedFile.write = stop


STATES = [
    ("data", "layer-00000.safetensors"),
    ("budget", "gradients-00000.safetensors"),
    ("budget", "measured-00001.safetensors"),
    ("budget", "moeq_sensitivity.json"),
    ("data", "run.json"),
    ("own text", "ebss.jsonl"),
    ("own text", "ebss.manifest.json"),
]


@pytest.mark.parametrize(("mode", "name"), STATES)
def test_one_flipped_bit_in_what_is_kept(mode, name, source, undisturbed, tmp_path):
    wanted, _ = undisturbed(mode)
    rng = random.Random(f"{SEED} {name}")
    place = at(source, tmp_path, mode, "out")
    is_measured = name.startswith(("gradients", "measured"))
    stop = stop_before_the_table if is_measured else lambda: stop_after(LAYERS - 1)
    assert wait(start(mode, place, stop)) == 130, said(place)
    assert holds_progress(place.work)
    content = (place.work / name).read_bytes()
    state = {path.name: path.read_bytes() for path in place.work.iterdir()}
    for number in range(max(4, KILLS)):
        bit = rng.randrange(8 * len(content))
        if number % 2:  # the sign of a float32, where the file holds such
            bit = 8 * (len(content) - 4 * rng.randrange(1, len(content) // 8)) + 31
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (place.work / name).write_bytes(damaged)
        code = wait(start(mode, place))
        assert "Traceback" not in said(place), f"bit {bit}"
        if code == 0:
            assert digest(place) == wanted, f"bit {bit} of {name} went into the checkpoint"
            shutil.rmtree(place.out)
        else:
            assert code == 2, (bit, said(place))
            assert not place.out.exists()
        place.work.mkdir(exist_ok=True)
        for kept, before in state.items():
            (place.work / kept).write_bytes(before)
    finish(mode, place, wanted)


@pytest.mark.parametrize("what", ["out", "work"])
def test_three_processes_in_one_place(what, source, undisturbed, tmp_path):
    """One makes the checkpoint, the others say what is in their way; none harms another."""
    wanted, _ = undisturbed("data")
    places = [
        Place(
            source,
            tmp_path / ("out" if what == "out" else f"out{number}"),
            tmp_path / ("work" if what == "work" else f"work{number}"),
        )
        for number in range(3)
    ]
    children = [start("data", place) for place in places]
    codes = [wait(child) for child in children]
    assert set(codes) <= {0, 2} and 0 in codes
    for place, code in zip(places, codes, strict=True):
        if code == 0:
            assert digest(place) == wanted
    if what == "out":
        assert codes.count(0) == 1
    assert not list(tmp_path.glob(".*"))


def test_what_stood_there_before_stands_there_after(source, tmp_path):
    """An output with files of others, whatever the mode: refused, and nothing is changed."""
    for mode in MODES:
        place = at(source, tmp_path, mode, "out")
        if mode == "sample":
            place.out.write_text("theirs")
        else:
            place.out.mkdir()
            place.result.write_text("theirs")
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.suffix != ".said"
                  and p.is_file()}  # fmt: skip
        assert wait(start(mode, place)) in ({70} if mode in IN_PYTHON else {2}), said(place)
        assert {p: p.read_bytes() for p in before} == before
        assert not place.work.exists()
