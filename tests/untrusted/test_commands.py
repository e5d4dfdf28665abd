"""What a stranger's files may not do to the commands: hang, exhaust, run, show, take along."""

import ast
import json
import os
import struct
import sys
import time
from pathlib import Path

import pytest
import typer
from import_graph import modules
from strangers import INDEX, SIZE, edited, snapshot, write_checkpoint, write_index
from typer.testing import CliRunner

pytest.importorskip("llmcompressor")

from moeq_plugin.cli import app
from moeq_plugin.untrusted.reading import MAX_CONFIG_BYTES, open_regular, read_json

runner = CliRunner()
READING = ["verify", "inspect", "plan", "report", "convert"]
LOADING = ["sample", "quantize", "eval", "generate"]
MODEL = str(Path(__file__).parents[2] / "examples" / "assets" / "tiny_moe")


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint")


def command(name, checkpoint, out):
    text = out.with_name("text.txt")
    text.write_text("one two three " * 50)
    return {
        "report": ["report", checkpoint, "--out", out],
        "convert": ["convert", checkpoint, out, "--to", "gptq"],
        "sample": ["sample", checkpoint, out, "--num-sequences", 1, "--seq-len", 8],
        "quantize": ["quantize", checkpoint, out, "--scheme", "W4A16"],
        "eval": ["eval", checkpoint, checkpoint, "--text", text, "--seq-len", 8],
        "generate": ["verify", checkpoint, "--generate", "one"],
    }.get(name, [name, checkpoint])


def run(name, checkpoint, out, **settings):
    """Call a command and hold it to the law: a few lines, no traceback, no other exit code."""
    arguments = [str(argument) for argument in command(name, checkpoint, out)]
    done = runner.invoke(app, arguments, **settings)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in {0, 1, 2}
    assert len(done.output.splitlines()) < 200
    return done


def test_the_checkpoint_is_sound(checkpoint, tmp_path):
    for name in READING:
        done = run(name, checkpoint, tmp_path / name)
        assert done.exit_code == (2 if name == "plan" else 0), done.output


# F10: nothing hangs or exhausts


@pytest.mark.parametrize("name", [*READING, *LOADING])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", INDEX, "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_no_file(name, file, kind, checkpoint, tmp_path):
    (checkpoint / file).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(checkpoint / file)
    else:
        (checkpoint / file).symlink_to("/dev/zero")
    done = run(name, checkpoint, tmp_path / "out")
    is_read = name in LOADING or file != "tokenizer.json"
    if name == "report":  # which tells what it could not read
        is_read = False
        is_shown = file != "tokenizer.json"
        assert ("could not be read" in done.output) == is_shown
    if name == "inspect":  # for which the config will do
        is_read = file == "config.json"
    if name != "plan":  # which takes no quantized checkpoint
        assert (done.exit_code == 2) == is_read, done.output


@pytest.mark.parametrize("name", READING)
def test_a_huge_config_is_not_read(name, checkpoint, tmp_path):
    for file in ("config.json", INDEX, "moeq_run.json"):
        with (checkpoint / file).open("ab") as opened:
            opened.truncate(3 << 30)  # sparse
    began = time.process_time()
    done = run(name, checkpoint, tmp_path / "out")
    assert time.process_time() - began < 2
    assert done.exit_code == 2
    with pytest.raises(ValueError, match=f"more than the {MAX_CONFIG_BYTES}"):
        read_json(checkpoint / "config.json")


@pytest.mark.parametrize("name", [*READING, *LOADING])
@pytest.mark.parametrize("place", ["targets", "ignore", "dynamic"])
def test_a_pattern_does_not_run_away(name, place, checkpoint, tmp_path):
    config, save = edited(checkpoint)
    section = config["quantization_config"]
    if place == "dynamic":
        config["quantization_config"] = {
            "quant_method": "gptq", "bits": 4, "group_size": SIZE, "sym": True,
            "dynamic": {"-:((a|m|.)+)+$x": {}},
        }  # fmt: skip
    elif place == "targets":
        section["config_groups"]["group_0"]["targets"] = ["re:((m|.)+)+$x", "Linear"]
    else:
        section["ignore"].append("re:(([a-z0-9._])+.)+[A-Z]([a-z])+$")
    save()
    began = time.process_time()
    done = run(name, checkpoint, tmp_path / "out")
    assert time.process_time() - began < 20
    if name in LOADING and not (name == "generate" and place == "dynamic"):
        assert done.exit_code == 2
        assert "ways" in done.output


def test_the_experts_that_a_config_asks_for_are_bounded_by_those_of_the_file(tmp_path):
    header = {
        f"model.layers.{layer}.mlp.experts.0.up_proj.weight": {
            "dtype": "BF16", "shape": [1, 1], "data_offsets": [2 * layer, 2 * layer + 2],
        }
        for layer in range(2000)
    }  # fmt: skip
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + b"\x80\x3f" * 2000
    )
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of", "num_experts": 4096}')
    began = time.process_time()
    assert run("inspect", tmp_path, tmp_path / "out").exit_code == 0
    assert run("verify", tmp_path, tmp_path / "out").exit_code == 1
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, '{"model_type": ' + "9" * 5000 + "}", "\0",
     '{"model_type": "x", "a": [' + "[]," * (9 << 20) + "[]]}"],
    ids=["brackets", "deep", "digits", "zero", "many"],
)  # fmt: skip
@pytest.mark.parametrize("name", READING)
def test_json_may_be_anything(name, content, checkpoint, tmp_path):
    (checkpoint / "config.json").write_text(content[: MAX_CONFIG_BYTES + 1])
    expected = 0 if name == "report" else 2
    assert run(name, checkpoint, tmp_path / "out").exit_code == expected


def test_a_file_is_looked_at_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null"), tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="regular file|cannot be read"):
            open_regular(path)
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with open_regular(tmp_path / "link") as file:
        assert file.read() == b"x"


# F11: text of files only shows

EVIL = "\x1b]0;owned\x07\x1b[2J\rcheckpoint: 0 errors\u202e"


def plant(place, checkpoint):
    config, save = edited(checkpoint)
    section = config["quantization_config"]
    if place == "name in weight_map" or place == "file in weight_map":
        write_index(checkpoint)
        index, save = edited(checkpoint, INDEX)
        if place == "name in weight_map":
            index["weight_map"][EVIL] = "model.safetensors"
        else:
            index["weight_map"]["x"] = EVIL
    elif place == "file":
        (checkpoint / f"{EVIL}.safetensors").write_bytes(b"x")
        (checkpoint / "model.safetensors").rename(checkpoint / "other.safetensors")
    elif place == "format":
        section["format"] = EVIL
    elif place == "group":
        section["config_groups"][EVIL] = {"targets": ["x"]}
    elif place == "pattern":
        section["ignore"].append(f"re:({EVIL}")
    elif place == "method":
        section["quant_method"] = EVIL
    elif place == "family":
        config["model_type"] = EVIL
    elif place == "record key":
        record, save = edited(checkpoint, "moeq_run.json")
        record["runs"][0][EVIL] = 1
    else:
        record, save = edited(checkpoint, "moeq_run.json")
        record["schema_version"] = EVIL
    save()


PLACES = [
    "name in weight_map", "file in weight_map", "file", "format", "group", "pattern", "method",
    "family", "record key", "record version",
]  # fmt: skip


@pytest.mark.parametrize("name", [*READING, "quantize"])
@pytest.mark.parametrize("place", PLACES)
def test_no_control_character_of_a_file_reaches_the_terminal(place, name, checkpoint, tmp_path):
    plant(place, checkpoint)
    done = run(name, checkpoint, tmp_path / "out", color=True)
    assert all(line.isprintable() for line in done.output.split("\n")), done.output


@pytest.mark.parametrize("name", LOADING)
def test_a_name_that_cannot_be_shown_is_not_handed_to_those_who_print_it(
    name, checkpoint, tmp_path
):
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"model.norm.weight", b"model.n\\u001bweight", 1))
    done = run(name, checkpoint, tmp_path / "out", color=True)
    assert done.exit_code == 2
    assert "\x1b" not in done.output
    assert "printable" in done.output


def test_the_page_and_the_card_hold_no_markup_of_a_file(checkpoint, tmp_path):
    html = (
        "</script><img src=x onerror=alert(1)> [x](javascript:alert(1))\n---\nlicense: mit\n```\n"
    )
    config, save = edited(checkpoint)
    config["quantization_config"]["quant_method"] = html
    config["architectures"] = [html]
    save()
    record, save = edited(checkpoint, "moeq_run.json")
    run_ = record["runs"][0]
    run_ |= {"modifier": html, "calibration": html, "limits": [html], "kept": {html: html}}
    run_ |= {"model": f"a/{html}", "versions": {html: html}, "settings": {html: html}}
    run_["linears"][0] |= {"name": html, "scheme": html, "basis": "layer"}
    save()
    out, card = tmp_path / "page.html", tmp_path / "card.md"
    done = runner.invoke(app, ["report", str(checkpoint), "--out", str(out), "--card", str(card)])
    assert done.exit_code == 0, done.output
    assert "<img src=x" not in out.read_text()
    text = card.read_text()
    yaml = pytest.importorskip("yaml")
    metadata = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---"))
    assert metadata["tags"][-1] == html
    assert "license" not in metadata
    fenced = text.split("\n```")
    assert all("<img" not in part and "](javascript" not in part for part in fenced[::2][1:])
    assert "\nlicense" not in text


# F12: no code of the model runs


@pytest.mark.parametrize("name", LOADING)
def test_code_of_a_model_is_not_run_whatever_stdin_says(name, checkpoint, tmp_path):
    witness = tmp_path / "witness"
    (checkpoint / "evil.py").write_text(f"open({str(witness)!r}, 'w').write('owned')\n")
    config, save = edited(checkpoint)
    config["model_type"] = "evil"
    config["auto_map"] = {
        "AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilForCausalLM",
        "AutoTokenizer": ["evil.EvilTokenizer", None],
    }  # fmt: skip
    if name != "generate":
        del config["quantization_config"]
    save()
    (checkpoint / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}})
    )
    done = run(name, checkpoint, tmp_path / "out", input="y\n" * 20)
    assert not witness.exists()
    assert "[y/N]" not in done.output
    if name != "generate":  # which is not reached: the file does not fit such a config
        assert done.exit_code == 2
        assert "--trust-remote-code" in done.output


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("module", modules())
def test_whoever_loads_a_model_says_whether_its_code_is_trusted(module):
    """And nothing is unpickled but tensors."""
    for call in calls(ast.parse(modules()[module].read_text())):
        called, given = ast.unparse(call.func), {keyword.arg for keyword in call.keywords}
        if called.startswith("Auto") and called.endswith((".from_pretrained", ".from_config")):
            assert "trust_remote_code" in given, ast.unparse(call)
        if called == "torch.load":
            assert "weights_only" in given
        assert called not in {"pickle.load", "pickle.loads", "yaml.load", "eval", "exec"}


# F13: a copy takes nothing along from outside


def test_a_link_out_of_the_directory_is_not_copied(checkpoint, tmp_path):
    (tmp_path / "id_rsa").write_text("secret")
    (checkpoint / "notes.txt").symlink_to(tmp_path / "id_rsa")
    done = run("convert", checkpoint, tmp_path / "out")
    assert done.exit_code == 2
    assert "link" in done.output
    assert not (tmp_path / "out").exists()


def test_only_known_kinds_of_files_are_copied(checkpoint, tmp_path):
    for name in ("evil.py", "pytorch_model.bin", "run.sh", ".env", "merges.txt", "LICENSE"):
        (checkpoint / name).write_text("x")
    (checkpoint / "vocab.txt").symlink_to("merges.txt")  # inside
    done = run("convert", checkpoint, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "quantize_config.json", "model.safetensors", "moeq_run.json", "merges.txt",
        "LICENSE", "vocab.txt",
    }  # fmt: skip
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()
    assert "not copied: .env, evil.py, pytorch_model.bin, run.sh" in done.output


def test_a_snapshot_of_a_hubs_cache_is_copied(checkpoint, tmp_path):
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    (tmp_path / "models--x" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate([*checkpoint.iterdir()]):
        path.rename(tmp_path / "models--x" / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert run("convert", snapshot, tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "moeq_run.json").is_file()


# F14: every failure is a sentence


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), struct.error("x"), AttributeError("x"), RecursionError(), MemoryError(),
     OverflowError("x"), Exception("x"), ZeroDivisionError(), AssertionError()],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_whatever_is_raised_ends_in_a_line_and_exit_code_2(error, capsys):
    from moeq_plugin.cli.shared import errors

    with pytest.raises(typer.Exit) as ended, errors("verify"):
        raise error
    assert ended.value.exit_code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"moeq verify: {type(error).__name__}")
    assert printed.count("\n") == 1


def test_an_interruption_ends_with_130(capsys):
    from moeq_plugin.cli.shared import errors

    with pytest.raises(typer.Exit) as ended, errors("verify"):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130


@pytest.mark.parametrize("name", [*READING, *LOADING])
def test_a_refused_checkpoint_is_left_as_it_is(name, checkpoint, tmp_path):
    (checkpoint / "config.json").write_text("{")
    before = snapshot(checkpoint)
    run(name, checkpoint, tmp_path / "out")
    assert snapshot(checkpoint) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint", "text.txt", "out"}
    assert sys.getrecursionlimit() == 1000
