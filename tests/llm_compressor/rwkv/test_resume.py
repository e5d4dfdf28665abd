"""A run with codebooks that is stopped, wherever, goes on to the same file, bit for bit."""

import hashlib
import os
import random
import signal
import time

import pytest
import torch
from helpers import dataset, oneshot
from tiny_rwkv import ALL_IN_CODEBOOKS, MIXED, tiny_rwkv

pytest.importorskip("llmcompressor")

from transformers import AutoModelForCausalLM

import moeq_plugin.integrations.hf  # noqa: F401
from moeq_plugin import RWKVQuantModifier
from moeq_plugin.records.progress import listening
from moeq_plugin.records.run import RunRecord

RECIPES = {
    "codebooks": ALL_IN_CODEBOOKS,
    # what a layer has of each kind is kept together
    "mixed": {**MIXED, "targets": ["Linear", r"re:.*\.att\.[wavg][12]$"]},
    "budget": {"bits_per_weight": 4.5, "options": ["CB4D2_G32x16", "W4A16_G32", "W8A16_G32"]},
}
LAYERS = 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a directory with a model and its results of runs that nobody stopped."""
    path = tmp_path_factory.mktemp("whole")
    tiny_rwkv(path / "model", torch.float32, num_hidden_layers=LAYERS)
    for name in RECIPES:
        run(path / "model", path / name, name)
    return path


def run(model, out, name, work=None):
    settings = {**RECIPES[name], "work_dir": work and str(work)}
    oneshot(
        AutoModelForCausalLM.from_pretrained(model),
        RWKVQuantModifier(**settings),
        dataset(),
        shuffle_calibration_samples=False,
        output_dir=str(out),
    )


def digest(directory):
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def stop_at(step):
    """Return a listener that stops a run at the step of this number."""
    steps = iter(range(1000))

    def stop(_progress):
        if next(steps) == step:
            raise KeyboardInterrupt

    return stop


# the start of a pass is a step, and so is every layer that is finished; a budget measures first,
# and what stands before and behind the layers is a step there too
STEPS = [
    *((name, step) for name in ("codebooks", "mixed") for step in (1, LAYERS - 1, LAYERS)),
    *(("budget", step) for step in (LAYERS, LAYERS + 3, LAYERS + 5)),
]


@pytest.mark.parametrize(("name", "step"), STEPS)
def test_it_goes_on_to_the_same_file(name, step, whole, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    with listening(stop_at(step)), pytest.raises(KeyboardInterrupt):
        run(whole / "model", out, name, work)
    assert not out.exists()
    assert list(work.glob("measured-*" if name == "budget" else "layer-*"))

    run(whole / "model", out, name, work)

    assert digest(out) == digest(whole / name)
    ours, theirs = (RunRecord.load(of)[0].linears for of in (out, whole / name))
    assert sorted(map(str, ours)) == sorted(map(str, theirs))


def test_a_layer_is_kept_whole_or_not_at_all(whole, tmp_path):
    """One part for a layer: its codebooks would else be fitted to a layer that is rounded."""
    run(whole / "model", tmp_path / "out", "mixed", tmp_path / "work")
    assert len(list((tmp_path / "work").glob("layer-*"))) == LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "budget"])
def test_killed_at_random_moments_it_continues_to_the_same_file(name, whole, tmp_path):
    began = time.monotonic()
    run(whole / "model", tmp_path / "timed", name, tmp_path / "timed-work")
    duration = time.monotonic() - began
    rng = random.Random(name)
    for number in range(10):
        out, work = tmp_path / f"out{number}", tmp_path / f"work{number}"
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            try:
                run(whole / "model", out, name, work)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if not out.exists():
            run(whole / "model", out, name, work)
        assert digest(out) == digest(whole / name)
