"""The first lines of ``recipe.yaml``: how to run it, since the host does not know our names."""

from __future__ import annotations

from pathlib import Path

FILE_NAME = "recipe.yaml"
_INTRODUCTION = """\
# Run it with: moeq quantize MODEL OUT --recipe recipe.yaml --dataset FILE
# In Python, import moeq_plugin.integrations.llm_compressor before oneshot(recipe="recipe.yaml").
"""


def introduce_recipe(directory: Path) -> None:
    """Put what to run before the recipe that the host has written, if it has."""
    path = directory / FILE_NAME
    if not path.exists():
        return
    text = path.read_text()
    if not text.startswith("#"):
        path.write_text(_INTRODUCTION + text)
