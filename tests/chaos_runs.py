"""Runs that can be killed: every mode as a process that begins, dies or ends, and begins again."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import write_tiny
from helpers import int4

KILLS = int(os.environ.get("MOEQ_CHAOS_KILLS", "2"))  # per mode; 40 in all before a release
LAYERS = 3
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
OPTIONS = ["W3A16_G32", "W4A16_G32", "W8A16_G32"]
ROUNDING = {"config_groups": int4(), "ignore": ["lm_head", "re:.*gate$"]}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "data": {"MoEQuantModifier": {"config_groups": int4(), "ignore": ["lm_head"]}},
    "own text": {
        "MoEQuantModifier": {"config_groups": int4(), "ebss": {"num_sequences": 6, "seq_len": 16}}
    },
    "budget": {"MoEQuantModifier": {"bits_per_weight": 5.0, "options": OPTIONS}},
    "awq": {"MoEQuantAWQModifier": {"n_grid": 3}, "QuantizationModifier": ROUNDING},
}
MODES = (*RECIPES, "rwkv", "ranks", "convert", "sample")
IN_PYTHON = {"rwkv", "ranks"}  # without a command line, so that a refusal is a traceback


@dataclass(frozen=True)
class Place:
    """A directory with a model, data and recipes; where one run writes.

    Attributes:
        source: holds what all runs read.
        out: what the run makes.
        work: where its state is kept.
    """

    source: Path
    out: Path
    work: Path

    @property
    def result(self) -> Path:
        """Return the file that all runs of a mode write alike."""
        return self.out if self.out.suffix else self.out / "model.safetensors"


def write_sources(directory: Path) -> Path:
    """Write what all modes read."""
    write_tiny(directory, num_hidden_layers=LAYERS)
    for mode, modifiers in RECIPES.items():
        recipe = {"q_stage": {"q_modifiers": modifiers}}
        (directory / f"{mode}.yaml").write_text(json.dumps(recipe))
    return directory


def arguments(mode: str, place: Place) -> list[str]:
    """Return the command line of a run that begins or goes on."""
    if mode == "convert":
        return ["convert", str(place.source / "packed"), str(place.out), "--to", "gptq"]
    if mode == "sample":
        sizes = ["--num-sequences", "12", "--seq-len", "24"]
        return ["sample", str(place.source / "model"), str(place.out), *sizes]
    from moeq_plugin.files.work_dir import holds_state

    request = ["quantize", str(place.source / "model"), str(place.out), "--work-dir"]
    request += [str(place.work), "--recipe", str(place.source / f"{mode}.yaml")]
    request += [] if mode == "own text" else ["--dataset", str(place.source / "data.jsonl")]
    return [*request, *(["--resume"] if holds_state(place.work) else [])]


def start(mode: str, place: Place, prepare: Callable[[], object] = lambda: None) -> int:
    """Start a run in a forked process, whose imports are done; return its id.

    Args:
        mode: what to run.
        place: where.
        prepare: called in the process before the run.
    """
    child = os.fork()
    if child:
        return child
    code = 70  # a traceback
    try:
        said = os.open(str(place.out) + ".said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(said, stream)
        sys.stdout = sys.stderr = os.fdopen(said, "w", buffering=1)  # pytest has its own there
        prepare()
        code = _run(mode, place)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def kill(child: int, choose: Callable[[list[int]], int]) -> None:
    """Kill a run, or one of the processes that it consists of; return when all are gone.

    Args:
        child: the run.
        choose: takes one of several processes.
    """
    beside = Path(f"/proc/{child}/task/{child}/children").read_text().split()
    processes = [child, *map(int, beside)]
    os.kill(choose(processes), signal.SIGKILL)
    wait(child)
    while any(map(_is_running, processes[1:])):
        time.sleep(0.01)


def _is_running(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def _run(mode: str, place: Place) -> int:
    if mode == "ranks":
        return _run_ranks(place)
    if mode == "rwkv":
        from quantize_case import quantize

        quantize("scalar_fallback", place.out)
        return 0
    from moeq_plugin.cli import app

    try:
        app(arguments(mode, place))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def _run_ranks(place: Place) -> int:
    """Run two ranks, and end both where one ends badly, as a launcher does."""
    rendezvous = place.source / f"rendezvous-{os.getpid()}-{time.monotonic_ns()}"
    ranks = [_start_rank(rank, rendezvous, place) for rank in range(2)]
    codes = []
    while ranks:
        ended, status = os.wait()
        ranks.remove(ended)
        codes.append(os.waitstatus_to_exitcode(status))
        for rank in ranks if codes[-1] else []:
            os.kill(rank, signal.SIGKILL)
    return 70 if any(codes) else 0


def _start_rank(rank: int, rendezvous: Path, place: Place) -> int:
    launcher = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        # whoever kills the launcher kills the ranks
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() == launcher:
            import torch
            from test_distributed import run
            from torch import distributed

            torch.set_num_threads(1)
            method = f"file://{rendezvous}"
            distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=2)
            run(place.source / "model", place.out, work_dir=str(place.work))
            distributed.destroy_process_group()
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(child: int) -> int:
    """Return the exit code of a run, or minus the signal that has ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def said(place: Place) -> str:
    """Return what the last run at a place has printed."""
    return Path(str(place.out) + ".said").read_text(errors="replace")


def digest(place: Place) -> str:
    """Return a digest of what a run has made."""
    return hashlib.sha256(place.result.read_bytes()).hexdigest()
