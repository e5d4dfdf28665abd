"""What README and the first pages of the docs show runs when it is pasted, in order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llmcompressor")
pytest.importorskip("plotly")

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    *(f"docs/{n}.md" for n in ("index", "tutorial", "choosing", "data", "serving")),
]
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", flags=re.DOTALL)
MOST_LINES = 40


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_pasted_in_order_all_of_it_runs_and_none_prints_a_lot(page, tmp_path):
    for name in ("examples", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    moeq = tmp_path / "bin" / "moeq"
    moeq.parent.mkdir()
    call = "from moeq_plugin.cli import main; main()"
    moeq.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{call}" "$@"\n')
    moeq.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{moeq.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    environment.pop("LLM_COMPRESSOR_LOG_LEVEL", None)  # tests turn it down, readers do not
    for language, text in BLOCK.findall((ROOT / page).read_text()):
        program = (
            ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        )
        done = subprocess.run(
            [*program, text], cwd=tmp_path, env=environment, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout.decode()}"
        # a bar that is drawn over itself is one line
        assert done.stdout.count(b"\n") <= MOST_LINES, done.stdout.decode()


def test_every_page_with_examples_is_looked_at():
    """What is not pasted is marked as text: an example that nobody runs goes stale."""
    for page in PAGES:
        languages = re.findall(r"^```(\w*)$", (ROOT / page).read_text(), flags=re.MULTILINE)
        assert set(languages) <= {"bash", "python", "text", ""}
