"""What a command calls a model: a directory, a file or an id of a hub, told apart without imports.

A path that is not there would otherwise cost seconds of imports, and then be taken for an id.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_id(model: str) -> bool:
    """Return whether a name can be that of a model on a hub, ``owner/name``, and is no path.

    What would lie in a directory that is there is a path with a slip in it.
    """
    path = Path(model)
    return _ID.fullmatch(model) is not None and not path.exists() and not path.parent.is_dir()


def check_named(model: str) -> None:
    """Refuse what is neither there nor the form of an id.

    Raises:
        ValueError: saying what was expected, and what is near.
    """
    path = Path(model)
    if path.suffix == ".gguf" and path.is_file():
        raise ValueError(
            f"{path} is a file of llama.cpp, which llama.cpp alone reads; give the directory of "
            "the model that it was converted from (for llama.cpp see `moeq imatrix` and "
            "`moeq tensor-types`)"
        )
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(f"{path} holds no config.json: it is not the directory of a model")
        return
    if path.exists() or (is_id(model) and (not _is_offline() or cached(model) is not None)):
        return
    where = " and, offline, not in the cache of the hub either" if is_id(model) else ""
    raise ValueError(
        f"{model} is not there{where}; expected the directory of a model, or an id such as "
        f"owner/name{_near(path)}"
    )


def check_checkpoint(path: Path) -> None:
    """Look whether there is a directory, for commands that take no ids.

    Raises:
        ValueError: saying what was expected, and what is near.
    """
    if not path.is_dir():
        raise ValueError(
            f"{path} is not there; expected the directory of a checkpoint{_near(path)}"
        )


def cached(model: str) -> Path | None:
    """Return the newest whole snapshot of an id in the cache of the hub, ``None`` without one."""
    snapshots = _cache() / f"models--{model.replace('/', '--')}" / "snapshots"
    if not snapshots.is_dir():
        return None
    whole = [path for path in snapshots.iterdir() if (path / "config.json").exists()]
    return max(whole, key=lambda path: path.stat().st_mtime, default=None)


def local(model: str | Path) -> Path:
    """Return where the files of a model are, for commands that read headers and no weights.

    Raises:
        ValueError: if it is not there, or its files have not been downloaded.
    """
    name = str(model)
    if not is_id(name):
        check_named(name)
        return Path(name)
    found = cached(name)
    if found is None:
        raise ValueError(
            f"{name} is not a directory, and as an id of a hub its files are not in the cache: "
            f"hf download {name}"
        )
    return found


def _cache() -> Path:
    home = Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub")


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def _near(path: Path) -> str:
    """Return directories beside it whose names are nearly the same, as a question."""
    import difflib

    beside = path.parent
    names = [p.name for p in beside.iterdir() if p.is_dir()] if beside.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {beside / close[0]}?" if close else ""
