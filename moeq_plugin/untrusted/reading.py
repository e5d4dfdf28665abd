"""Open and parse files of strangers: regular files only, and no more than what a file may hold."""

from __future__ import annotations

import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from moeq_plugin.untrusted.broken import UnreadableFileError
from moeq_plugin.untrusted.patterns import check_content

MAX_CONFIG_BYTES = 16 << 20  # the largest configs of hubs have some hundred KB
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_LIST_BYTES = 256 << 20  # indexes and records: a million tensors take about 110 MB
_MAX_DEPTH = 64
# systems without pipes in the file system have no such flags
_FLAGS = ("O_RDONLY", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")
_HOW = sum(getattr(os, flag, 0) for flag in _FLAGS)
_MAX_CONTAINERS = 8 << 20  # objects and lists; two bytes of text become a hundred in memory


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read bytes; links are followed, as those of a hub's cache have to be.

    Raises:
        UnreadableFileError: if it is a pipe, a device or a directory, or cannot be opened.
    """
    try:
        # Opening alone can already start a device or wait for the other end of a pipe; between
        # the look and the opening the file may be replaced, so the open one is looked at too.
        _check_regular(path.stat(), path)
        file = os.open(path, _HOW)
    except UnreadableFileError:
        raise
    except OSError as cause:
        raise UnreadableFileError(f"{path} cannot be read: {cause.strerror}") from None
    except ValueError as cause:  # a name with a null byte
        raise UnreadableFileError(f"{path} cannot be read: {cause}") from None
    try:
        _check_regular(os.fstat(file), path)
    except UnreadableFileError:
        os.close(file)
        raise
    return os.fdopen(file, "rb")


def _check_regular(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UnreadableFileError(f"{path} is not a regular file")


def check_model(model: str | Path) -> None:
    """Refuse a model's directory that would keep whoever loads it waiting or counting.

    Loaders of others open what they find: pipes, devices, configs of any size and any pattern;
    and they print names of tensors that they cannot place.

    Args:
        model: directory; an id of a hub is left to those who load it.

    Raises:
        ValueError: saying which file, or which pattern.
    """
    directory = Path(model)
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.exists() and not path.is_dir():
            _check_regular(path.stat(), path)
            if path.suffix == ".safetensors":
                _check_names(path)
    if (directory / "config.json").exists():
        check_content(read_json(directory / "config.json"))


def _check_names(path: Path) -> None:
    """Refuse a safetensors file in which a name cannot be shown; the rest is up to the loader."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length <= MAX_HEADER_BYTES:
            parse_object(file.read(length), path)


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        UnreadableFileError: if it is none, or has more than ``limit`` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > limit else file.read(limit + 1)
    if size > limit or len(content) > limit:
        raise UnreadableFileError(
            f"{path.name}: {max(size, len(content))} bytes are more than the {limit} that such a "
            "file may have"
        )
    return content


def read_text(path: Path, limit: int) -> str:
    """Return the text of a regular file in UTF-8.

    Raises:
        UnreadableFileError: if it is none, or has more than ``limit`` bytes.
    """
    try:
        return read_bounded(path, limit).decode()
    except UnicodeDecodeError as cause:
        raise UnreadableFileError(f"{path.name}: not UTF-8 text ({cause.reason})") from None


def read_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UnreadableFileError: if it is no regular file, too large, too deep or no JSON object.
    """
    parsed = parse_object(read_bounded(path, limit), path)
    _check_depth(parsed, path)
    return parsed


def parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """Return the object that JSON text describes.

    Args:
        content: the text.
        path: where it is from, for messages.

    Raises:
        UnreadableFileError: if it describes none, or names in it could not even be shown.
    """
    if content.count(b"{") + content.count(b"[") > _MAX_CONTAINERS:
        raise UnreadableFileError(f"{path.name}: more than {_MAX_CONTAINERS} objects and lists")
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as cause:
        raise UnreadableFileError(f"{path.name}: not JSON ({str(cause)[:100]})") from None
    if not isinstance(parsed, dict):
        raise UnreadableFileError(f"{path.name}: a JSON object was expected")
    if not all(name.isprintable() for name in parsed):
        raise UnreadableFileError(f"{path.name}: a name is not printable")
    return parsed


def _check_depth(parsed: dict[str, Any], path: Path) -> None:
    level: list[Any] = [parsed]
    for _ in range(_MAX_DEPTH):
        inner = [v for of in level for v in (of.values() if isinstance(of, dict) else of)]
        level = [value for value in inner if isinstance(value, dict | list)]
        if not level:
            return
    raise UnreadableFileError(f"{path.name}: nested more than {_MAX_DEPTH} levels deep")
