"""What the site shows beside ``docs/``: the command line's own help, and pages of the root.

Links that lead out of the pages become the names of what they lead to.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
COPIES = {"project/changelog.md": "CHANGELOG.md", "project/security.md": "SECURITY.md"}
OUTSIDE = re.compile(
    r"\[([^\]]*)\]\((?:\.\./)+([^)]*)\)|\[([^\]]*)\]\(((?!https?:|#)[^)]*\.(?:patch|py))\)"
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are written elsewhere."""
    pages = {path: (ROOT / source).read_text() for path, source in COPIES.items()}
    pages["reference/cli.md"] = command_line()
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page without links to files that the site does not have."""
    is_copy = page.file.src_uri in COPIES
    if is_copy:
        return re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", markdown)
    return OUTSIDE.sub(lambda found: found[1] or found[3] or "", markdown)


def command_line() -> str:
    """Return the help of every command, as Markdown."""
    import typer.main
    from typer.cli import get_docs_for_click

    from moeq_plugin.cli import app

    command = typer.main.get_command(app)
    context = command.context_class(command, info_name="moeq")
    return get_docs_for_click(obj=command, ctx=context, name="moeq", title="Command line")
