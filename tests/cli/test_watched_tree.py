"""No command creates, changes or deletes a file that it was not asked for, wherever that lies."""

import json
import os
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("llmcompressor")

from chaos_runs import RECIPES
from command_line import command, listing, write_tiny

from moeq_plugin.cli import app

pytestmark = pytest.mark.slow
# Caches of the libraries below, where a person has them, are theirs: each is named here.
CACHES = ("home/.cache/huggingface", "home/.cache/torch", "home/.triton", "home/.cache/vllm")
W4 = ("--scheme", "W4A16_G32", "--dataset", "data.jsonl")
FEW = (*W4, "--num-calibration-samples", "1")
# command -> the paths that it may make, with all that is below them
COMMANDS = {
    "quantize": (["quantize", "model", "made/w4", *W4], {"made/w4"}),
    "quantize --work-dir": (["quantize", "model", "w4", *W4, "--work-dir", "state/w"], {"w4"}),
    "quantize --resume": (
        ["quantize", "model", "w4", *FEW, "--work-dir", "kept", "--resume"], {"w4", "kept"}
    ),
    "quantize on own text": (["quantize", "model", "o", "--recipe", "own text.yaml"], {"o"}),
    "quantize, smoothed": (
        ["quantize", "model", "q", "--recipe", "awq.yaml", "--dataset", "data.jsonl"], {"q"}
    ),
    "quantize, failing": (["quantize", "model", "w4", "--scheme", "W4A17"], set()),
    "quantize to a budget": (
        ["quantize", "model", "b", "--bits-per-weight", "6", "--dataset", "data.jsonl",
         "--option", "W4A16_G32", "--option", "W8A16_G32"],
        {"b"},
    ),
    "plan": (["plan", "model", "--scheme", "W4A16_G32"], set()),
    "plan --probe": (
        ["plan", "deep", "--probe", "--scheme", "W8A16", "--dataset", "data.jsonl"], set()
    ),
    "plan --sensitivity": (
        ["plan", "model", "--sensitivity", "s.json", "--dataset", "data.jsonl", "--option",
         "W4A16_G32", "--option", "W8A16_G32", "--bits-per-weight", "6", "--allocation", "a.json"],
        {"s.json", "a.json"},
    ),
    "imatrix": (["imatrix", "model", "m.gguf", "--dataset", "data.jsonl"], {"m.gguf"}),
    "imatrix, failing": (["imatrix", "absent", "m.gguf"], set()),
    "tensor-types, failing": (
        ["tensor-types", "absent", "t.txt", "--bits-per-weight", "3.0"], set()
    ),
    "generate": (["generate", "quant", "1 2 3", "--max-new-tokens", "2"], set()),
    "generate, failing": (["generate", "absent", "1 2 3"], set()),
    "verify": (["verify", "quant", "--source", "model"], set()),
    "verify --json": (["verify", "quant", "--json"], set()),
    "verify, failing": (["verify", "absent"], set()),
    "verify --generate": (["verify", "quant", "--generate", "1 2 3"], set()),
    "inspect": (["inspect", "quant"], set()),
    "inspect --json": (["inspect", "model/config.json", "--json"], set()),
    "inspect, failing": (["inspect", "data.jsonl"], set()),
    "plan, failing": (["plan", "absent", "--scheme", "W4A16_G32"], set()),
    "eval, failing": (["eval", "model", "absent", "--text", "text.txt", "--json", "e.json"], set()),
    "report, failing": (["report", "absent", "--out", "r.html"], set()),
    "sample, failing": (["sample", "absent", "made/s.jsonl"], set()),
    "convert, failing": (["convert", "model", "gptq", "--to", "gptq"], set()),
    "convert back": (["convert", "converted", "ct", "--to", "compressed-tensors"], {"ct"}),
    "eval": (
        ["eval", "model", "quant", "--text", "text.txt", "--seq-len", "16", "--json", "e.json"],
        {"e.json"},
    ),
    "report": (["report", "quant", "--card", "card.md"], {"quant/report.html", "card.md"}),
    "report --out": (["report", "quant", "--out", "r.html"], {"r.html"}),
    "sample": (
        ["sample", "model", "made/s.jsonl", "--num-sequences", "2", "--seq-len", "8"],
        {"made/s.jsonl", "made/s.manifest.json"},
    ),
    "convert": (["convert", "quant", "gptq", "--to", "gptq"], {"gptq"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A home, a directory for temporary files and one to work in, with what others have there."""
    tree = tmp_path_factory.mktemp("tree")
    (tree / "home").mkdir()
    (tree / "tmp").mkdir()
    (tree / "work").mkdir()
    write_tiny(tree / "work")
    write_tiny(
        tree / "deep", num_hidden_layers=6, hidden_size=128, moe_intermediate_size=128, head_dim=32
    )
    (tree / "deep" / "model").rename(tree / "work" / "deep")
    (tree / "deep" / "data.jsonl").unlink()
    (tree / "deep").rmdir()
    (tree / "work" / "text.txt").write_text(" ".join(str(i % 128) for i in range(400)))
    done = moeq(tree, ["quantize", "model", "quant", *W4])
    assert done.returncode == 0, done.stderr
    done = moeq(tree, ["convert", "quant", "converted", "--to", "gptq"])
    assert done.returncode == 0, done.stderr
    # refused at the end for its few tokens, so that its state is kept
    done = moeq(tree, ["quantize", "model", "w4", *FEW, "--work-dir", "kept", "--strict"])
    assert done.returncode == 1, done.stderr
    for name in ("own text", "awq"):
        recipe = {"q_stage": {"q_modifiers": RECIPES[name]}}
        (tree / "work" / f"{name}.yaml").write_text(json.dumps(recipe))
    for theirs in (".w4.partial.txt", "w4.partial", "w4.work.bak", "quant/theirs.partial",
                   ".moeq.lock.txt", "s.manifest.json.bak"):  # fmt: skip
        (tree / "work" / theirs).write_text("precious")
    return tree


def moeq(tree, arguments):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_HOME", "XDG_"))}
    places = {"HOME": str(tree / "home"), "TMPDIR": str(tree / "tmp"), "HF_HUB_OFFLINE": "1"}
    paths = {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        command(*arguments), cwd=tree / "work", env={**kept, **places, **paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_touches_only_what_it_was_asked_for(name, tree):
    arguments, may_make = COMMANDS[name]
    before = listing(tree)
    done = moeq(tree, arguments)
    is_starved = name == "quantize --resume"  # one row is too few, and the exit code says so
    assert done.returncode == (2 if "failing" in name else int(is_starved)), done.stderr
    assert "Traceback" not in done.stderr
    after = listing(tree)
    asked = {f"work/{path}" for path in may_make}
    parents = {"work/made", "work/state"}  # of what was asked for

    def is_asked(path):
        above = [path, *(path[:i] for i, letter in enumerate(path) if letter == "/")]
        return path in parents or any(p in asked for p in above) or path.startswith(CACHES)

    touched = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert {p for p in touched if not is_asked(p)} - {"home/.cache"} == set()
    assert asked <= touched
    for path in sorted((tree / "work" / made for made in may_make), reverse=True):
        subprocess.run(["rm", "-rf", str(path)], check=True)


def test_every_command_is_watched():
    commands = {
        (of.name or of.callback.__name__).replace("_", "-") for of in app.registered_commands
    }
    needs_llama_cpp = {"tensor-types"}
    for ending, without in ((set(), needs_llama_cpp), ({"failing"}, set())):
        watched = {arguments[0] for name, (arguments, _) in COMMANDS.items()
                   if ending <= set(name.split(", "))}  # fmt: skip
        assert watched - without == commands - without
