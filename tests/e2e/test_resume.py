"""A run that is killed, or whose disk is full, continues to the same checkpoint, bit for bit."""

import errno
import hashlib
import os
import random
import signal
import stat
import time

import pytest
import torch
from datasets import Dataset
from helpers import NoProcessor, dataset, int4, tiny_model, tokens

pytest.importorskip("llmcompressor")

from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from moeq_plugin import MoEQuantModifier
from moeq_plugin.integrations.llm_compressor.moequant import run_state as work_dir_module
from moeq_plugin.records.run import RunRecord

LAYERS = 4


@pytest.fixture
def model_path(tmp_path):
    tiny_model("qwen3_moe", tmp_path / "model", num_hidden_layers=LAYERS)
    return tmp_path / "model"


def run(model_path, out, work=None, data="given", **settings):
    """Quantize from disk to disk, as a process of its own would."""
    settings = {"config_groups": int4(), "work_dir": work and str(work), **settings}
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
        recipe=MoEQuantModifier(**settings),
        dataset=dataset() if isinstance(data, str) else data,
        processor=NoProcessor(),
        shuffle_calibration_samples=False,
        output_dir=str(out),
    )


def digest(directory):
    names = sorted(p.name for p in directory.glob("*.safetensors"))
    assert names
    return hashlib.sha256(b"".join((directory / n).read_bytes() for n in names)).hexdigest()


def in_a_child(*arguments, **settings):
    """Start ``run`` in a forked process; return its id."""
    child = os.fork()
    if child:
        return child
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        run(*arguments, **settings)
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.slow
def test_killed_at_20_random_moments_it_continues_to_the_same_file(model_path, tmp_path):
    whole = tmp_path / "whole"
    began = time.monotonic()
    assert os.waitpid(in_a_child(model_path, whole), 0)[1] == 0
    duration = time.monotonic() - began
    wanted, rng, layers_kept = digest(whole), random.Random(0), []
    for number in range(20):
        out, work = tmp_path / f"out{number}", tmp_path / f"work{number}"
        child = in_a_child(model_path, out, work)
        time.sleep(rng.uniform(0.2, 1.0) * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        layers_kept.append(len(list(work.glob("layer-*.safetensors"))))
        if not out.exists():
            assert os.waitpid(in_a_child(model_path, out, work), 0)[1] == 0
        assert digest(out) == wanted, f"kill {number}, {layers_kept[-1]} layers kept"
    assert len(set(layers_kept)) > 2, "the kills did not spread over the run"


def test_a_finished_layer_is_not_solved_again(model_path, tmp_path, monkeypatch):
    run(model_path, tmp_path / "whole", tmp_path / "work")
    monkeypatch.setattr(
        "moeq_plugin.integrations.llm_compressor.moequant.run.solve_stack",
        lambda *_, **__: pytest.fail("solved again"),
    )
    run(model_path, tmp_path / "again", tmp_path / "work")
    assert digest(tmp_path / "again") == digest(tmp_path / "whole")
    records = [RunRecord.load(tmp_path / name)[0].linears for name in ("whole", "again")]
    assert records[0] == records[1]


@pytest.mark.parametrize("write", range(LAYERS + 2))
def test_a_full_disk_loses_nothing(write, model_path, tmp_path, monkeypatch):
    """The state has a file for the run and one per layer; then comes the checkpoint."""
    run(model_path, tmp_path / "whole")
    work, original, synced = tmp_path / "work", os.fsync, []

    def full(descriptor):
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            synced.append(descriptor)
            if len(synced) == write + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run(model_path, tmp_path / "out", work)
    assert not (tmp_path / "out").exists()
    assert len(list(work.glob("layer-*"))) == max(write - 1, 0)
    run(model_path, tmp_path / "out", work)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_disk_that_is_full_at_the_end_leaves_no_checkpoint(model_path, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("moeq_plugin.integrations.llm_compressor.checkpoint.saving.save_records", full)
        with pytest.raises(OSError, match="No space left"):
            run(model_path, tmp_path / "out", tmp_path / "work")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "work"]
    run(model_path, tmp_path / "out", tmp_path / "work")
    run(model_path, tmp_path / "whole")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"affinity_power": 2.0}, "setting affinity_power: was 1.0, is 2.0"),
        ({"config_groups": int4(num_bits=3)}, "setting config_groups"),
        ({"data": dataset(seed=1)}, "data"),
    ],
    ids=["power", "scheme", "data"],
)
def test_another_run_is_refused_by_the_name_of_what_changed(settings, field, model_path, tmp_path):
    run(model_path, tmp_path / "out", tmp_path / "work")
    before = {p.name: p.read_bytes() for p in (tmp_path / "work").iterdir()}
    with pytest.raises(ValueError, match="belongs to another run") as error:
        run(model_path, tmp_path / "other", tmp_path / "work", **settings)
    assert f"  - {field}" in str(error.value)
    assert str(error.value).count("  - ") == 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "work").iterdir()} == before


def test_another_model_is_refused(model_path, tmp_path):
    run(model_path, tmp_path / "out", tmp_path / "work")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3, 5] += 1e-3
    model.save_pretrained(tmp_path / "changed")
    with pytest.raises(ValueError, match="  - model: was"):
        run(tmp_path / "changed", tmp_path / "other", tmp_path / "work")


def test_a_damaged_state_is_named(model_path, tmp_path):
    run(model_path, tmp_path / "out", tmp_path / "work")
    layer = tmp_path / "work" / "layer-00001.safetensors"
    layer.write_bytes(layer.read_bytes()[:-100])
    with pytest.raises(ValueError, match="layer-00001.safetensors was changed after"):
        run(model_path, tmp_path / "again", tmp_path / "work")


def test_files_of_something_else_are_left_alone(model_path, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds files of something else"):
        run(model_path, tmp_path / "out", tmp_path / "work")
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["thesis.txt"]


def test_data_in_changing_order_are_refused(model_path, tmp_path):
    rows = Dataset.from_dict({"input_ids": tokens(16, 16).tolist()})
    with pytest.raises(ValueError, match="same order every time"):
        oneshot(
            model=AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32),
            recipe=MoEQuantModifier(config_groups=int4(), work_dir=str(tmp_path / "work")),
            dataset=rows,
            processor=NoProcessor(),
            shuffle_calibration_samples=True,
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"data": None, "ebss": {"num_sequences": 6, "seq_len": 16}},
        {
            "config_groups": None,
            "bits_per_weight": 5.0,
            "options": ["W3A16_G32", "W4A16_G32", "W8A16_G32"],
        },
        {"config_groups": int4(symmetric=False), "min_effective_tokens": 100.0},
        {"preset": "best"},
        {"config_groups": int4(num_bits=3), "corrected_target": True},
        {
            "config_groups": None,
            "bits_per_weight": 5.0,
            "options": ["W3A16_G32", "W4A16_G32", "W8A16_G32"],
            "corrected_target": True,
        },
    ],
    ids=["own text", "budget", "starved", "best", "corrected", "budget, corrected"],
)
def test_every_kind_of_run_continues(settings, model_path, tmp_path, monkeypatch):
    """Stopped after two layers, by an exception as good as a kill: nothing is flushed after it."""
    run(model_path, tmp_path / "whole", **settings)
    keep, count = work_dir_module.RunState.keep_noted, iter(range(1000))

    def stop(self):
        if next(count) == 2:
            raise KeyboardInterrupt
        keep(self)

    with monkeypatch.context() as process:
        process.setattr(work_dir_module.RunState, "keep_noted", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model_path, tmp_path / "out", tmp_path / "work", **settings)
    run(model_path, tmp_path / "out", tmp_path / "work", **settings)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
