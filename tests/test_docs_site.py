"""The site is built without a warning, and documents every command and every option."""

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")

from moeq_plugin.cli import app

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_every_command_and_option_is_documented(site):
    import typer.main

    text = html.unescape((site / "reference" / "cli.html").read_text())
    for name, command in typer.main.get_command(app).commands.items():
        assert f"moeq {name}" in text
        for parameter in command.params:
            for option in (o for o in parameter.opts if o.startswith("--")):
                assert option in text, (name, option)
    assert "typer.Exit" not in text


@pytest.mark.slow
def test_the_fields_of_the_recipe_are_documented(site):
    text = (site / "reference" / "api.html").read_text()
    for field in ("affinity_power", "bits_per_weight", "preset", "chat_template", "scalar_frac"):
        assert field in text


@pytest.mark.slow
def test_no_page_asks_for_anything_of_the_network(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text()
        )
        assert loaded == [], page
