"""Where commands of a person write: the places that lose a run are refused before it begins."""

import os
import signal
import stat
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("llmcompressor")

from command_line import command, listing, write_tiny
from typer.testing import CliRunner

from moeq_plugin.cli import app
from moeq_plugin.files.work_dir import holds_progress
from moeq_plugin.integrations.llm_compressor.moequant.run_state import RunState

runner = CliRunner()
SCHEME = ("--scheme", "W4A16_G32")


@pytest.fixture
def tiny(tmp_path):
    return write_tiny(tmp_path)


def quantize(tiny, out="out", *arguments):
    request = ["quantize", str(tiny / "model"), str(tiny / out), "--dataset"]
    return runner.invoke(app, [*request, str(tiny / "data.jsonl"), *SCHEME, *map(str, arguments)])


def refused(done, message):
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    said = [line for line in done.stderr.splitlines() if "elapsed" not in line]  # not progress
    assert len(said) <= 2 and "Traceback" not in done.output


@pytest.mark.parametrize("work", ["out", ".", "out/work", "model", "to_out"])
def test_a_work_directory_that_would_take_something_along_is_refused(work, tiny):
    """F01: the run was deleted with its state."""
    (tiny / "to_out").symlink_to("out")
    before = listing(tiny)
    refused(quantize(tiny, "out", "--work-dir", tiny / work), "nothing was done")
    assert listing(tiny) == before


@pytest.mark.parametrize("out", ["model", "data.jsonl", "."])
def test_an_output_that_is_something_else_is_refused(out, tiny):
    before = listing(tiny)
    assert quantize(tiny, out).exit_code == 2
    assert listing(tiny) == before


def test_a_link_to_an_empty_directory_is_filled(tiny):
    """F02: it failed after the whole run."""
    (tiny / "disk").mkdir()
    (tiny / "out").symlink_to("disk")
    done = quantize(tiny)
    assert done.exit_code == 0, done.output
    assert (tiny / "out").is_symlink() and (tiny / "disk" / "config.json").exists()
    assert {p.name for p in tiny.iterdir()} == {"model", "data.jsonl", "disk", "out"}


def test_what_others_put_into_the_output_during_the_run_stays(tiny, monkeypatch):
    """F16: it was replaced."""
    keep = RunState.keep_noted

    def filling(self):
        keep(self)
        (tiny / "out").mkdir(exist_ok=True)
        (tiny / "out" / "model.safetensors").write_text("theirs")

    monkeypatch.setattr(RunState, "keep_noted", filling)
    done = quantize(tiny)
    refused(done, "the checkpoint is complete in")
    assert [p.read_text() for p in (tiny / "out").iterdir()] == ["theirs"]
    assert (tiny / "out-2" / "tokenizer.json").exists()
    assert holds_progress(tiny / "out.work")


def test_files_of_others_in_the_work_directory_stay(tiny):
    (tiny / "work").mkdir()
    (tiny / "work" / "download.partial").write_text("theirs")
    refused(quantize(tiny, "out", "--work-dir", tiny / "work"), "holds files of something else")
    assert (tiny / "work" / "download.partial").read_text() == "theirs"


def test_what_others_put_into_the_work_directory_during_the_run_stays(tiny, monkeypatch):
    keep = RunState.keep_noted

    def adding(self):
        keep(self)
        (self.path / "notes.txt").write_text("theirs")

    monkeypatch.setattr(RunState, "keep_noted", adding)
    assert quantize(tiny).exit_code == 0
    assert [p.name for p in (tiny / "out.work").iterdir()] == ["notes.txt"]


def test_an_empty_work_directory_of_a_person_stays(tiny):
    (tiny / "work").mkdir()
    assert quantize(tiny, "out", "--work-dir", tiny / "work").exit_code == 0
    assert list((tiny / "work").iterdir()) == []


def test_a_run_that_failed_early_leaves_nothing(tiny):
    (tiny / "data.jsonl").write_text('{"nothing": 1}\n')
    assert quantize(tiny).exit_code != 0
    assert {p.name for p in tiny.iterdir()} == {"model", "data.jsonl"}


def test_no_room_is_known_before_calibration(tiny, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(
        "moeq_plugin.integrations.llm_compressor.moequant.run.Run.begin",
        lambda *_: pytest.fail("calibrates"),
    )
    refused(quantize(tiny), "no room for")
    assert {p.name for p in tiny.iterdir()} == {"model", "data.jsonl"}


def test_the_mask_holds_for_a_checkpoint(tiny):
    before = os.umask(0o027)
    try:
        assert quantize(tiny).exit_code == 0
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tiny / "out").iterdir()}
    assert modes == {0o640}


@pytest.mark.parametrize("size", ["60k", "112k", "136k"])
def test_a_disk_that_fills_up_is_a_sentence(size, tiny):
    """F17: the state or the checkpoint does not fit; with room the same run ends well."""
    (tiny / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tiny / "disk")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    try:
        done = quantize(tiny, "disk/out", "--work-dir", tiny / "work")
        if done.exit_code == 0:
            pytest.skip("it fits")
        refused(done, "moeq quantize: ")
        assert list((tiny / "disk").iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(tiny / "disk")], check=True)
    resume = ["--resume"] if (tiny / "work").exists() else []
    done = quantize(tiny, "out", "--work-dir", tiny / "work", *resume)
    assert done.exit_code == 0, done.output


def test_two_starts_at_once_with_the_default_work_directory(tiny):
    request = command("quantize", tiny / "model", tiny / "out", *SCHEME)
    request += ["--dataset", str(tiny / "data.jsonl")]
    both = [subprocess.Popen(request, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    loser = errors[[process.returncode for process in both].index(2)]
    assert "in use by another process" in loser or "is not empty" in loser or "holds the" in loser
    assert "Traceback" not in loser
    assert {p.name for p in tiny.iterdir()} == {"model", "data.jsonl", "out"}
    assert runner.invoke(app, ["verify", str(tiny / "out")]).exit_code == 0


@pytest.mark.parametrize("moment", ["loading", "quantize"])
def test_control_c_ends_with_130_wherever_it_comes(moment, tiny):
    request = command("quantize", tiny / "model", tiny / "out", *SCHEME, "--jsonl")
    request += ["--dataset", str(tiny / "data.jsonl")]
    # whoever runs the tests in the background ignores the signal, and so would the command
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(request, preexec_fn=heed, **pipes)
    if moment == "quantize":
        run.stdout.readline()
    else:
        while not (tiny / ".out.partial" / "out").exists():
            assert run.poll() is None
    run.send_signal(signal.SIGINT)
    errors = run.communicate()[1]
    assert run.returncode == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors
    assert not (tiny / ".out.partial").exists() and not (tiny / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "model", "model", "--text", "t.txt", "--json", "t.txt"], "would replace"),
        (["eval", "model", "model", "--text", "t.txt", "--json", "model/config.json"], "earlier"),
        (["eval", "model", "model", "--text", "t.txt", "--json", "model"], "would replace"),
        (["report", "model", "--out", "model/config.json"], "earlier result"),
        (["report", "model", "--card", "model/model.safetensors"], "earlier result"),
        (["report", "model", "--out", "r.html", "--card", "r.html"], "must be apart"),
        (["sample", "model", "model/config.json"], "earlier result"),
        (["sample", "model", "model"], "would replace"),
        (["plan", "model", "--sensitivity", "s.json", "--dataset", "t.txt", "--allocation",
          "model/config.json", "--bits-per-weight", "4"], "earlier result"),
        (["plan", "model", "--sensitivity", "s.json", "--dataset", "t.txt", "--allocation",
          "s.json", "--bits-per-weight", "4"], "must be apart"),
        (["plan", "model", "--sensitivity", "no/s.json", "--dataset", "t.txt"], "may be written"),
        (["convert", "model", "model", "--to", "gptq"], "would replace"),
        (["convert", "model", "full", "--to", "gptq"], "is not empty"),
    ],
)  # fmt: skip
def test_no_command_writes_over_something_else(arguments, message, tiny, monkeypatch):
    (tiny / "t.txt").write_text("some text")
    (tiny / "full").mkdir()
    (tiny / "full" / "theirs").write_text("precious")
    monkeypatch.chdir(tiny)
    before = listing(tiny)
    done = runner.invoke(app, arguments)
    refused(done, message)
    assert listing(tiny) == before


def test_python_refuses_what_the_command_refuses(tiny, monkeypatch):
    from helpers import NoProcessor, dataset, int4
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    from moeq_plugin import MoEQuantModifier

    monkeypatch.chdir(tiny)
    for out, work, message in (
        ("out", "out", "apart"),
        ("out", "out/work", "apart"),
        ("out", "model", "would replace"),
        ("model", "work", "not empty"),
    ):
        with pytest.raises(ValueError, match=message):
            oneshot(
                model=AutoModelForCausalLM.from_pretrained("model"),
                recipe=MoEQuantModifier(config_groups=int4(), work_dir=work),
                dataset=dataset(),
                processor=NoProcessor(),
                output_dir=out,
            )
    assert {p.name for p in tiny.iterdir()} == {"model", "data.jsonl"}


def test_python_publishes_tokenizer_and_all_by_one_rename(tiny, monkeypatch):
    from helpers import dataset, int4
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    from moeq_plugin import MoEQuantModifier

    seen, rename = [], Path.rename

    def noting(self, target):
        if Path(target) == tiny / "out":
            seen.append({p.name for p in self.iterdir()})
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", noting)
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(tiny / "model"),
        tokenizer=str(tiny / "model"),
        recipe=MoEQuantModifier(config_groups=int4()),
        dataset=dataset(),
        output_dir=str(tiny / "out"),
    )
    assert seen == [{p.name for p in (tiny / "out").iterdir()}]
    assert {"config.json", "model.safetensors", "tokenizer.json", "moeq_run.json"} <= seen[0]
