"""The command line, ``moeq``: one module per command, which registers itself.

Frameworks are imported inside the commands, so help is instant.
"""

import os

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
    # Threads of OpenMP wait for each other in a loop before they sleep. Where something else uses a
    # processor that loop makes small layers ten times slower; this short one costs nothing else.
    # It is read when torch is imported, which no command has done yet.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    app()
