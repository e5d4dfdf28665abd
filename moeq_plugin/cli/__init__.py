"""The command line, ``moeq``: one module per command, which registers itself.

Frameworks are imported inside the commands, so help is instant.
"""

from moeq_plugin.cli import (  # noqa: F401 - in the order help shows them
    convert,
    evaluate,
    generate,
    imatrix,
    inspect,
    plan,
    quantize,
    report,
    sample,
    tensor_types,
    verify,
)
from moeq_plugin.cli.shared import app, help_without_sections

help_without_sections(app)


def main() -> None:
    """Run ``moeq``."""
    app()
