"""Files and arguments of strangers, thousands of them: a few lines, and exit code 0, 1 or 2.

What was once found is in ``corpus.json`` and tried first, every time.
"""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import typer
from damaged_json import damaged, paths_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strangers import INDEX, snapshot, write_checkpoint, write_index
from typer.testing import CliRunner

pytest.importorskip("llmcompressor")

from moeq_plugin.cli import app
from moeq_plugin.files.sampled_set import SampledSetFile

runner = CliRunner()
COMMAND = typer.main.get_command(app)
LOADING = {"sample", "quantize", "eval"}
CORPUS = Path(__file__).with_name("corpus.json")
MANIFEST = {"format": 1, "is_complete": False, "sha256": None, "model": "m", "config": {}}
SEQUENCE = {"index": 0, "input_ids": [1, 2], "nll": 1.0, "imbalance": 0.5, "load": [[1, 1]]}
RECIPE = {
    "quant_stage": {
        "quant_modifiers": {
            "MoEQuantModifier": {"scheme": "W4A16", "targets": ["Linear"], "ignore": ["lm_head"]}
        }
    }
}
TABLE = {
    "schema_version": 1, "rows": ["a", "b"], "options": ["W4", "W8"], "domains": ["d"],
    "loss": [[[1.0, 0.1], [2.0, 0.2]]], "num_bytes": [[4, 8], [4, 8]], "num_weights": [8, 8],
    "undercovered": [], "units": {}, "interactions": {}, "fixed_bytes": 1,
}  # fmt: skip
EVALUATION = {
    "schema_version": 1, "reference": "a", "quantized": "b", "settings": {}, "versions": {},
    "texts": {"t": {"kl": 0.1, "perplexity": 2.0}}, "continuations": [],
    "tasks": [{"task": "t", "metric": "acc", "higher_is_better": True, "reference": 0.5,
               "reference_stderr": None, "score": 0.4, "stderr": 0.1}],
}  # fmt: skip
numbers = st.one_of(st.integers(-3, 300), st.integers(), st.floats(), st.just(10**400))
texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["re:(", "re:(a+)+$", "\x1b[2J", "../x", "/dev/zero", "", "gptq", "compressed-tensors",
         "W4A16", "model.safetensors", "\ud800", "Linear", "x" * 3000, "<b>", "W3A16_G0"]
    ),
)  # fmt: skip
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)


def many(cases):
    return settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(autouse=True)
def made_once(monkeypatch):
    """Making the command line anew for each call takes longer than most calls."""
    monkeypatch.setattr("typer.testing._get_command", lambda app: COMMAND)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A checkpoint with everything that may lie beside one."""
    root = tmp_path_factory.mktemp("fuzz")
    checkpoint = write_checkpoint(root / "checkpoint")
    write_index(checkpoint)
    (checkpoint / "moeq_sensitivity.json").write_text(json.dumps(TABLE))
    (checkpoint / "moeq_eval.json").write_text(json.dumps(EVALUATION))
    (root / "out").mkdir()
    return root


def clear(directory):
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def run(root, arguments):
    """Call a command and hold it to the law."""
    clear(root / "out")
    before = snapshot(root)
    done = runner.invoke(app, [str(argument) for argument in arguments])
    clear(root / "out")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in {0, 1, 2}
    assert done.exit_code == 0 or done.output.strip()
    assert len(done.output.splitlines()) <= 200
    if arguments[0] not in LOADING:  # transformers draws bars
        assert all(line.isprintable() for line in done.output.split("\n"))
    assert snapshot(root) == before
    return done.exit_code


@st.composite
def damages(draw):
    """What to do to a JSON file, as plain data that the corpus can keep."""
    return [
        [draw(st.integers(0, 10_000)), draw(st.sampled_from(["set", "remove", "add"])),
         draw(texts), draw(values)]
        for _ in range(draw(st.integers(1, 2)))
    ]  # fmt: skip


def damage(content, changes):
    for number, how, key, value in changes:
        paths = paths_of(content)
        if not paths:
            return
        *before, last = paths[number % len(paths)]
        parent = content
        for step in before:
            parent = parent[step]
        if how == "remove":
            del parent[last]
        elif how == "add" and isinstance(parent, dict):
            parent[key] = value
        else:
            parent[last] = value


# for each kind of file, the commands that read it
COMMANDS = {
    "config.json": ["verify", "inspect", "plan", "convert"],
    INDEX: ["verify", "inspect"],
    "header": ["verify", "inspect", "convert"],
    "moeq_run.json": ["report"],
    "moeq_eval.json": ["report"],
    "moeq_sensitivity.json": ["report", "allocate"],
}


def arguments_of(command, root):
    checkpoint, out = root / "checkpoint", root / "out"
    return {
        "convert": ["convert", checkpoint, out / "new", "--to", "gptq"],
        "report": ["report", checkpoint, "--out", out / "page", "--card", out / "card"],
        "allocate": ["plan", checkpoint, "--sensitivity", checkpoint / "moeq_sensitivity.json",
                     "--bits-per-weight", 5],
    }.get(command, [command, checkpoint])  # fmt: skip


def try_file(root, kind, command, changes):
    file = root / "checkpoint" / ("model.safetensors" if kind == "header" else kind)
    original = file.read_bytes()
    if kind == "header":
        length = int.from_bytes(original[:8], "little")
        content, rest = json.loads(original[8 : 8 + length]), original[8 + length :]
    else:
        content, rest = json.loads(original), b""
    damage(content, changes)
    text = json.dumps(content).encode()
    prefix = len(text).to_bytes(8, "little") if kind == "header" else b""
    with damaged(file, prefix + text + rest):
        run(root, arguments_of(command, root))


@pytest.mark.parametrize("case", json.loads(CORPUS.read_text()), ids=lambda case: case["found"])
def test_what_was_found_stays_mended(case, root):
    try_file(root, case["kind"], case["command"], case["changes"])


def page_is_plain(monkeypatch):
    """The library of charts in each page is not what is tried here."""
    import plotly.offline

    monkeypatch.setattr(plotly.offline, "get_plotlyjs", lambda: "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "cases"),
    [("config.json", 1200), (INDEX, 500), ("header", 900), ("moeq_run.json", 600),
     ("moeq_eval.json", 300), ("moeq_sensitivity.json", 300)],
)  # fmt: skip
def test_any_entry_of_a_file_may_be_anything(kind, cases, root, monkeypatch):
    page_is_plain(monkeypatch)

    @many(cases)
    @given(command=st.sampled_from(COMMANDS[kind]), changes=damages())
    def attempt(command, changes):
        try_file(root, kind, command, changes)

    attempt()


@pytest.mark.slow
@many(300)
@given(
    name=st.sampled_from(["config.json", INDEX, "model.safetensors", "moeq_run.json"]),
    command=st.sampled_from(["verify", "inspect", "convert"]),
    place=st.integers(0, 1 << 16),
    noise=st.binary(max_size=16),
)
def test_any_bytes_may_be_overwritten_or_cut_off(name, command, place, noise, root):
    file = root / "checkpoint" / name
    original = file.read_bytes()
    place %= len(original)
    rest = original[place + len(noise) :] if noise else b""
    with damaged(file, original[:place] + noise + rest):
        run(root, arguments_of(command, root))


@pytest.mark.slow
@many(200)
@given(changes=damages())
def test_a_recipe_may_be_anything(changes, root):
    from moeq_plugin.cli.modifiers import of_recipe

    content = json.loads(json.dumps(RECIPE))
    damage(content, changes)
    path = root / "out" / "recipe.yaml"
    path.write_text(json.dumps(content))
    with refused():
        of_recipe(path, root / "out" / "work")


@contextmanager
def refused():
    """What is a ``ValueError`` is a sentence of the command's."""
    try:
        yield
    except ValueError as error:
        assert str(error)


@pytest.mark.slow
@many(500)
@given(of_manifest=damages(), of_line=damages(), cut=st.integers(0, 40))
def test_a_sampled_set_may_be_anything(of_manifest, of_line, cut, root):
    path = root / "out" / "set.jsonl"
    manifest, sequence = json.loads(json.dumps(MANIFEST)), json.loads(json.dumps(SEQUENCE))
    damage(manifest, of_manifest)
    damage(sequence, of_line)
    lines = f"{json.dumps(SEQUENCE)}\n{json.dumps(sequence)}\n{json.dumps(SEQUENCE)}"
    path.write_text(lines[: len(lines) - cut])
    path.with_suffix(".manifest.json").write_text(json.dumps(manifest))
    with refused():
        SampledSetFile(path).read()


OPTIONS = {
    "verify": ["--source", "--target", "--tp", "--json"],
    "inspect": ["--json"],
    "plan": ["--scheme", "--tp", "--sensitivity", "--bits-per-weight", "--option", "--target",
             "--robust"],
    "report": ["--evaluation", "--out"],
    "convert": ["--to", "--zero-points", "--names"],
    "eval": ["--text", "--dtype", "--seq-len", "--batch-size"],
    "quantize": ["--scheme", "--bits-per-weight", "--size-gb", "--recipe", "--dataset", "--option"],
    "sample": ["--tau", "--seq-len", "--beam-width"],
}  # fmt: skip


@pytest.mark.parametrize(
    "request_", [["quantize", "checkpoint", "", "--scheme", "4"]], ids=" ".join
)
def test_a_request_that_was_found_stays_answered(request_, root, monkeypatch):
    monkeypatch.chdir(root / "out")
    run(root, [root / part if part == "checkpoint" else part for part in request_])


@pytest.mark.slow
@many(300)
@given(data=st.data())
def test_any_request_is_answered(data, root, monkeypatch):
    monkeypatch.chdir(root / "out")  # where a file may be asked for by any name
    command = data.draw(st.sampled_from(sorted(OPTIONS)))
    arguments = [command]
    for _ in range(data.draw(st.integers(0, 2))):
        arguments.append(
            data.draw(st.sampled_from([str(root / "checkpoint"), "absent", "", "--help", "-x"]))
        )
    for option in data.draw(st.lists(st.sampled_from(OPTIONS[command]), max_size=3)):
        arguments.append(option)
        arguments.append(data.draw(st.sampled_from(
            ["4", "-1", "0", "nan", "1e999", "x", "", "W4A16_G32", "vllm", "gptq", "-",
             str(root / "checkpoint"), str(root / "checkpoint" / "config.json"), "\x1b[2J"]
        )))  # fmt: skip
    run(root, arguments)
