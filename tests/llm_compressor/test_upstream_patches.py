"""The patches that we offer apply to the installed llm-compressor and do what they say."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

llmcompressor = pytest.importorskip("llmcompressor")

PATCHES = sorted((Path(__file__).parents[2] / "docs" / "upstream").glob("*.patch"))
# imports the patched modules in the place of those that are installed
RUN = """
import importlib.util, sys
from importlib.abc import MetaPathFinder
from pathlib import Path

SOURCE = Path("src")

class Patched(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        file = SOURCE / (name.replace(".", "/") + ".py")
        return importlib.util.spec_from_file_location(name, file) if file.exists() else None

sys.meta_path.insert(0, Patched())
"""
PROOFS = {
    "0001": "import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests']))",
    "0002": """
from llmcompressor.core.state import State
state = State()
assert state.update(output_dir="out", processor="tokenizer") is not None
assert (state.output_dir, state.processor) == ("out", "tokenizer")
import llmcompressor.entrypoints
file = Path(sys.modules["llmcompressor.entrypoints.oneshot"].__file__).resolve()
assert Path.cwd().resolve() in file.parents
""",
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("patch") is None, reason="needs the program patch")
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_it_applies_and_works(patch, tmp_path):
    installed = Path(llmcompressor.__file__).parent
    text = patch.read_text()
    for line in text.splitlines():
        if line.startswith("--- a/src/llmcompressor/"):
            name = line.removeprefix("--- a/src/llmcompressor/")
            target = tmp_path / "src" / "llmcompressor" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(installed / name, target)
    subprocess.run(["patch", "-p1", "--fuzz=0"], input=text, text=True, cwd=tmp_path, check=True)
    proof = RUN + PROOFS[patch.name[:4]]
    done = subprocess.run(
        [sys.executable, "-c", proof], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
