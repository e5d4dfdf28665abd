"""What `pip install .` alone gives: commands that read headers work, others name what they need."""

import subprocess
import sys
from pathlib import Path

import pytest

TINY = str(Path(__file__).parents[2] / "examples" / "assets" / "tiny_moe")
BROUGHT_BY_EXTRAS = (
    "llmcompressor", "transformers", "datasets", "compressed_tensors", "loguru", "yaml",
    "accelerate", "huggingface_hub", "tokenizers", "jinja2", "plotly", "lm_eval", "gguf",
)  # fmt: skip
CODE = f"""
import sys
sys.modules.update(dict.fromkeys({BROUGHT_BY_EXTRAS}))
from moeq_plugin.cli import main
sys.argv[0] = "moeq"
main()
"""


def moeq(*arguments):
    return subprocess.run(
        [sys.executable, "-c", CODE, *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "quantize"),
        (["inspect", TINY], "qwen3_moe"),
        (["plan", TINY], "quantized: 208 linears"),
        (["verify", TINY], "0 errors, 0 warnings"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_reads_headers_works(arguments, said):
    done = moeq(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert said in done.stdout


def test_a_quantized_checkpoint_is_verified(tmp_path):
    """Whether transformers reads its experts is known of families that we know."""
    pytest.importorskip("llmcompressor")
    from checkpoints import make_checkpoint

    make_checkpoint("mixtral", tmp_path)
    done = moeq("verify", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 errors, 0 warnings" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["quantize", TINY, "out", "--scheme", "W4A16"], "llmcompressor"),
        (["sample", TINY, "set.jsonl"], "llmcompressor"),
        (["generate", TINY, "hello"], "llmcompressor"),
        (["eval", TINY, TINY, "--text", __file__], "llmcompressor"),
        (["imatrix", TINY, "matrix.gguf"], "llmcompressor"),
        (["report", TINY, "--out", "page.html"], "report"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_a_missing_extra_is_named(arguments, extra, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = moeq(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert f"pip install 'moeq-plugin[{extra}]'" in done.stderr
    assert list(tmp_path.iterdir()) == []
