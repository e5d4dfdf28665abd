"""What a command says before any framework is loaded, and where it says it."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import moeq_plugin
from moeq_plugin.cli import app
from moeq_plugin.cli.named_model import cached, check_named, is_id, local
from moeq_plugin.cli.shared import errors, say, say_json

runner = CliRunner()
COMMANDS = [
    (command.name or command.callback.__name__).replace("_", "-")
    for command in app.registered_commands
]


def cpu_seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("code", "limit"),
    [
        ("import moeq_plugin", 0.1),
        ("from moeq_plugin.cli import main; sys.argv[1:] = ['--help']; main()", 0.5),
    ],
)
def test_importing_and_help_cost_next_to_nothing(code, limit):
    def cost(code):
        before = cpu_seconds_of_children()
        subprocess.run([sys.executable, "-c", f"import sys; {code}"], capture_output=True)
        return cpu_seconds_of_children() - before

    # the least of some: a busy machine only adds
    assert min(cost(code) for _ in range(3)) - min(cost("pass") for _ in range(3)) < limit


def test_the_version():
    done = runner.invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"moeq {moeq_plugin.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_nothing_of_exceptions(command):
    done = runner.invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert "Raises" not in done.output
    assert "typer.Exit" not in done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "no/such/model", "out", "--scheme", "W4A16"],
        ["sample", "./no-model", "set.jsonl"],
        ["generate", "no-model", "hello"],
        ["imatrix", "no-model", "matrix.gguf"],
        ["convert", "no-model", "out", "--to", "gptq"],
        ["report", "no-model"],
        ["eval", "no-model", "neither", "--text", "t"],
        ["inspect", "no-model"],
        ["plan", "no-model"],
        ["verify", "no-model"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_wrong_path_costs_no_import(arguments, tmp_path):
    code = (
        "import sys, atexit; from moeq_plugin.cli import main\n"
        "atexit.register(lambda: print(sorted({'torch', 'transformers'} & {*sys.modules})))\n"
        "main()"
    )
    before = cpu_seconds_of_children()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert cpu_seconds_of_children() - before < 1
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    assert done.stderr.startswith(f"moeq {arguments[0]}: ")
    assert len(done.stderr.splitlines()) == 1
    assert "is not there" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing", "a count", "a policy"],
)
def test_threads_give_up_waiting_soon_unless_told_otherwise(given, expected):
    """On a machine that does something else too, a run took ten times as long."""
    code = (
        "import os, sys, atexit; from moeq_plugin.cli import main; sys.argv[1:] = ['--version']\n"
        "atexit.register(lambda: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules))\n"
        "main()"
    )
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{expected} False"


def test_a_slip_in_a_path_is_no_id(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny_moe").mkdir(parents=True)
    (tmp_path / "models" / "tiny_moe" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    check_named("models/tiny_moe")
    assert not is_id("models/tiny_meo")  # `models` is a directory here
    with pytest.raises(ValueError, match="did you mean models/tiny_moe?"):
        check_named("models/tiny_meo")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        check_named("models")


def test_an_id_is_looked_for_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert is_id("owner/name-1.5B")
    with pytest.raises(ValueError, match="offline, not in the cache"):
        check_named("owner/name-1.5B")
    with pytest.raises(ValueError, match=r"hf download owner/name-1\.5B"):
        local("owner/name-1.5B")
    snapshot = tmp_path / "models--owner--name-1.5B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert cached("owner/name-1.5B") is None  # nothing has arrived yet
    (snapshot / "config.json").write_text("{}")
    check_named("owner/name-1.5B")
    assert local("owner/name-1.5B") == snapshot


def test_what_others_print_is_no_result():
    application = typer.Typer()

    @application.command()
    def command() -> None:
        with errors("command"):
            print("a log of somebody else")
            say_json(json.dumps({"sound": True}))
            say("a warning", err=True)

    done = runner.invoke(application)
    assert json.loads(done.stdout) == {"sound": True}
    assert done.stderr == "a log of somebody else\na warning\n"


def test_who_has_seen_enough_ends_a_command_silently():
    """As in `moeq inspect MODEL | head -1`."""
    code = "from moeq_plugin.cli import main; main()"
    model = Path(__file__).parents[2] / "examples" / "assets" / "tiny_moe"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", model],
        stdout=write, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_missing_package_names_its_extra():
    application = typer.Typer()

    @application.command()
    def command() -> None:
        with errors("command"):
            raise ModuleNotFoundError("No module named 'llmcompressor'", name="llmcompressor.x")

    done = runner.invoke(application)
    assert done.exit_code == 2
    assert "pip install 'moeq-plugin[llmcompressor]'" in done.stderr
