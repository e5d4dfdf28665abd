"""Damaged configs, headers and files end in a message, never in a traceback.

1,000 cases for the commands that read checkpoints, and broken recipes for the others.
"""

import json
import shutil
from pathlib import Path

import pytest
from checkpoints import to_gptq
from damaged_json import damaged, paths_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moeq_plugin.cli import app

runner = CliRunner()
OUTCOMES = {0, 1, 2}
ENDLESS = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
numbers = st.one_of(st.integers(-3, 300), st.integers(), st.floats())
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), st.just("re:(")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


def run(*arguments):
    """Call a command; what it raises beyond its exit code fails the test."""
    done = runner.invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code in OUTCOMES
    assert done.exit_code == 0 or done.output.strip()
    return done.exit_code


def run_one(data, path):
    """Verify reads most, so it is called most."""
    return run(data.draw(st.sampled_from(["verify", "verify", "inspect", "plan"])), path)


def run_all(path):
    return [run("verify", path), run("inspect", path), run("plan", path)]


@pytest.fixture(scope="module")
def bases(sound, tmp_path_factory):
    """A model, its checkpoint and the same in the GPTQ format, to be damaged over and over."""
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(sound("deepseek_v3").parent / "model", root / "model")
    shutil.copytree(sound("deepseek_v3"), root / "compressed")
    shutil.copytree(root / "compressed", root / "gptq")
    to_gptq(root / "gptq")
    return [root / "model", root / "compressed", root / "gptq"]


def change(content, path, value, is_removed):
    for key in path[:-1]:
        content = content[key]
    if is_removed:
        del content[path[-1]]
    else:
        content[path[-1]] = value


@pytest.mark.slow
@ENDLESS
@given(data=st.data())
def test_any_entry_of_a_config_may_be_anything(data, bases):
    base = data.draw(st.sampled_from(bases))
    file = base / "config.json"
    config = json.loads(file.read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(paths_of(config)))
        change(config, path, data.draw(values), data.draw(st.booleans()))
    with damaged(file, json.dumps(config).encode()):
        run_one(data, base)


@pytest.mark.slow
@ENDLESS
@given(data=st.data())
def test_a_file_may_be_cut_anywhere(data, bases):
    base = data.draw(st.sampled_from(bases))
    file = base / data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    original = file.read_bytes()
    end = data.draw(st.one_of(st.integers(0, 400), st.integers(0, len(original) - 1)))
    with damaged(file, original[: min(end, len(original) - 1)]):
        assert run_one(data, base) == 2 or file.name != "config.json"


@pytest.mark.slow
@ENDLESS
@given(data=st.data())
def test_any_entry_of_a_header_may_be_anything(data, bases):
    base = data.draw(st.sampled_from(bases))
    file = base / "model.safetensors"
    original = file.read_bytes()
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])
    change(
        header,
        data.draw(st.sampled_from(paths_of(header))),
        data.draw(values),
        data.draw(st.booleans()),
    )
    text = json.dumps(header).encode()
    with damaged(file, len(text).to_bytes(8, "little") + text + original[8 + length :]):
        run_one(data, base)


@pytest.mark.slow
@ENDLESS
@given(data=st.data())
def test_any_bytes_may_be_overwritten(data, bases):
    base = data.draw(st.sampled_from(bases))
    file = base / data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    original = file.read_bytes()
    place = data.draw(st.one_of(st.integers(0, 200), st.integers(0, len(original) - 1)))
    noise = data.draw(st.binary(min_size=1, max_size=16))
    place = min(place, len(original) - 1)
    with damaged(file, original[:place] + noise + original[place + len(noise) :]):
        run_one(data, base)


@pytest.mark.slow
@ENDLESS
@given(
    command=st.sampled_from(["verify", "inspect", "plan"]),
    options=st.dictionaries(
        st.sampled_from(["--tp", "--target", "--source", "--scheme", "--json"]),
        st.one_of(st.text(max_size=6), st.integers().map(str)),
        max_size=2,
    ),
)
def test_any_request_is_answered(command, options, bases):
    arguments = [part for option in options.items() for part in option]
    arguments = [argument for argument in arguments if "\0" not in argument]
    run(command, bases[0], *arguments)


def test_an_index_may_be_anything(tmp_path, bases):
    shutil.copytree(bases[1], tmp_path / "out")
    index = tmp_path / "out" / "model.safetensors.index.json"
    for content in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../../x"}}',
                    '{"weight_map": {"a": ""}}', '{"weight_map": {"a": "model.safetensors"}}',
                    "[" * 100_000):  # fmt: skip
        index.write_text(content)
        assert run_all(tmp_path / "out")[0] == (1 if "model." in content else 2)


@pytest.mark.parametrize("name", ["empty", "binary"])
def test_a_config_may_be_no_text(name, tmp_path):
    (tmp_path / "config.json").write_bytes(b"" if name == "empty" else bytes(range(256)))
    assert run_all(tmp_path) == [2, 2, 2]
    assert run("inspect", Path(tmp_path) / "config.json") == 2
