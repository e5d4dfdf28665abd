"""What README and docs say is there, and runs as it stands."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from import_graph import is_package, modules

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "moeq_plugin|integrations|tests|examples|benchmarks|docs"
ROOMS = "core|models|rwkv|checkpoint|records|report|files|cli"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_named_exists(page):
    text = page.read_text()
    named = set(re.findall(rf"(?:{FOLDERS})/[\w./-]*\w", text))
    named |= {f"moeq_plugin/{p}" for p in re.findall(rf"`((?:{ROOMS})/[\w/.]+)`", text)}
    beside = re.findall(r"\]\((\w+\.md)\)", text)
    named |= {str((page.parent / link).relative_to(ROOT)) for link in beside}
    assert {name for name in named if not (ROOT / name).exists()} == set()


CONTRIBUTING = (ROOT / "docs" / "contributing.md").read_text()


def test_every_folder_of_code_is_explained():
    folders = {path.parent.relative_to(ROOT) for path in modules().values()}
    roots = {Path("moeq_plugin"), Path("integrations")}  # their rows are those of their folders
    assert {str(f) for f in folders - roots if f"| `{f}/` |" not in CONTRIBUTING} == set()


def test_every_file_that_all_modifiers_share_is_explained():
    room = ROOT / "integrations" / "llm_compressor"
    shared = [p for m, p in modules().items() if p.parent == room and not is_package(m)]
    rows = [f"| `{path.relative_to(ROOT)}` |" for path in shared]
    assert [row for row in rows if row not in CONTRIBUTING] == []


def test_every_touch_of_the_host_is_explained():
    host = ast.parse((ROOT / "integrations" / "llm_compressor" / "host.py").read_text())
    public = {n.name for n in host.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"}
    rows = "".join(line for line in CONTRIBUTING.splitlines() if line.startswith("| `"))
    assert {name for name in public if f"`{name}`" not in rows} == set()


def test_the_walks_are_as_long_as_they_say():
    said = re.findall(r"^### [^\n]*: (\d+) modules$(.*?)(?=^##)", CONTRIBUTING, flags=re.M | re.S)
    for number, walk in said:
        steps = re.findall(r"^\d+\. `([\w/]+\.py)`", walk, flags=re.M)
        assert len(set(steps)) == len(steps) == int(number)
    assert len(said) == 3


def test_the_readme_is_short_and_its_first_screen_has_the_two_commands():
    lines = PAGES[0].read_text().splitlines()
    assert len(lines) <= 160
    assert [line for line in lines[:12] if line.startswith("make ")] == [
        line for line in lines if line.startswith("make ")
    ]


@pytest.mark.slow
def test_the_first_example_runs_as_it_stands(tmp_path):
    pytest.importorskip("llmcompressor")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    first = "import torch; torch.set_num_threads(1)\n" + blocks("README.md", "python")[0]
    subprocess.run([sys.executable, "-c", first], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out" / "W4A16" / "model.safetensors").exists()
    assert (tmp_path / "out" / "W4A16" / "moeq_run.json").exists()


def test_the_yaml_example_makes_the_modifier():
    pytest.importorskip("llmcompressor")
    from llmcompressor.recipe import Recipe

    import moeq_plugin.integrations.llm_compressor  # noqa: F401

    recipe = Recipe.create_instance(blocks("docs/entry_points.md", "yaml")[0])
    assert [type(modifier).__name__ for modifier in recipe.modifiers] == ["MoEQuantModifier"]


def test_the_tables_are_those_of_the_committed_results():
    script = ROOT / "benchmarks" / "tables.py"
    subprocess.run([sys.executable, script, "--check"], check=True)
