"""The file that says which run a directory belongs to, with a digest of what it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeq_plugin.files.atomic import write_text

_DIGEST = "sha256"  # of the other entries


def read_run(path: Path) -> dict[str, Any]:
    """Return what :func:`write_run` wrote.

    Raises:
        ValueError: if it is something else by now.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        digest = content.pop(_DIGEST)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(_changed(path, str(error))) from error
    if digest != run_digest(content):
        raise ValueError(_changed(path, "its digest does not fit"))
    return content


def write_run(path: Path, run: Mapping[str, Any]) -> None:
    """Write what a run is: values that JSON holds, by name."""
    content = json.dumps({**run, _DIGEST: run_digest(run)}, indent=1) + "\n"
    write_text(path, content)


def _changed(path: Path, reason: str) -> str:
    return (
        f"{path} was changed after it had been written ({reason}), so it does not say which run "
        f"this is; delete {path.parent} to start anew"
    )


def run_digest(run: Mapping[str, Any]) -> str:
    """Return a digest of what a run is, whatever the order."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
