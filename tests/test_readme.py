"""What README and docs say is there, and runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "moeq_plugin|integrations|tests|examples|benchmarks|docs"
ROOMS = "core|models|rwkv|checkpoint|records|report|files|cli"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[0].read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_named_exists(page):
    text = page.read_text()
    named = set(re.findall(rf"(?:{FOLDERS})/[\w./-]*\w", text))
    named |= {f"moeq_plugin/{p}" for p in re.findall(rf"`((?:{ROOMS})/[\w/.]+)`", text)}
    named |= {f"docs/{link}" for link in re.findall(r"\]\((\w+\.md)\)", text)}
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_first_screen_shows_python():
    assert PAGES[0].read_text().split("```python")[0].count("\n") < 30


@pytest.mark.slow
def test_the_first_example_runs_as_it_stands(tmp_path):
    pytest.importorskip("llmcompressor")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    first = "import torch; torch.set_num_threads(1)\n" + blocks("python")[0]
    subprocess.run([sys.executable, "-c", first], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out" / "W4A16" / "model.safetensors").exists()
    assert (tmp_path / "out" / "W4A16" / "moeq_run.json").exists()


def test_the_yaml_example_makes_the_modifier():
    pytest.importorskip("llmcompressor")
    from llmcompressor.recipe import Recipe

    import moeq_plugin.integrations.llm_compressor  # noqa: F401

    recipe = Recipe.create_instance(blocks("yaml")[0])
    assert [type(modifier).__name__ for modifier in recipe.modifiers] == ["MoEQuantModifier"]


def test_the_tables_are_those_of_the_committed_results():
    script = ROOT / "benchmarks" / "tables.py"
    subprocess.run([sys.executable, script, "--check"], check=True)
