"""What a release consists of says the same everywhere."""

import re
import runpy
import tomllib
from pathlib import Path

import moeq_plugin

ROOT = Path(__file__).parent.parent


def test_links_of_the_readme_become_absolute():
    absolute = runpy.run_path(str(ROOT / ".ci" / "name_repository"))["absolute"]
    text = "[a](docs/a.md) ![b](docs/b.svg) [c](https://c.org/d) [e](#f)"
    assert absolute(text, "https://h.org/o/n") == (
        "[a](https://h.org/o/n/blob/main/docs/a.md) ![b](https://h.org/o/n/raw/main/docs/b.svg) "
        "[c](https://c.org/d) [e](#f)"
    )
    readme = absolute((ROOT / "README.md").read_text(), "https://h.org/o/n")
    assert re.findall(r"\]\((?!https?:|#)", readme) == []


def test_the_version_stands_in_changelog_and_citation():
    version = moeq_plugin.__version__
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_types_are_shipped_and_the_command_needs_no_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (ROOT / "moeq_plugin" / "py.typed").exists()
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["moeq_plugin"]
    assert any(of.startswith("typer") for of in project["project"]["dependencies"])
