"""A sampled set on disk: a JSON object per sequence and line, and a manifest beside it.

``set.jsonl`` is what any other tool reads; ``set.manifest.json`` says where it comes from. Lines
are written as sequences are finished, so that a set whose sampling was interrupted, or whose disk
ran full, can be loaded and continued.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moeq_plugin.core.sampling import SampledSequence
from moeq_plugin.files.atomic import remove_partial, write_text
from moeq_plugin.files.lock import locked
from moeq_plugin.untrusted.broken import BROKEN, sentence
from moeq_plugin.untrusted.reading import read_bounded, read_json
from moeq_plugin.untrusted.typed import build

MAX_SET_BYTES = 4 << 30

_FORMAT = 1
_IDENTITY = ("format", "model", "config", "prompts")  # what must agree to continue a set


class SampledSetFile:
    """One set on disk.

    Args:
        path: of the JSON lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = hashlib.sha256()  # of the lines that this process has read and written
        self._num_lines = 0
        self.manifest_path = path.with_suffix(".manifest.json")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from writing the set.

        Raises:
            InUseError: if one does.
        """
        with locked(self.path.with_name(f".{self.path.name}.lock"), self.path):
            for path in (self.path, self.manifest_path):  # of a process that was killed
                remove_partial(path)
            yield

    def begin(self, manifest: dict[str, Any]) -> list[SampledSequence]:
        """Start a new set or continue the one that is there; return what it contains.

        Raises:
            ValueError: if the set that is there is another one.
        """
        manifest = {"format": _FORMAT, "is_complete": False, "sha256": None, **manifest}
        manifest = json.loads(json.dumps(manifest))  # as it will be read back
        if not self.manifest_path.exists():
            if self.path.exists():
                raise ValueError(
                    f"{self.path} exists without {self.manifest_path.name}, so it cannot be "
                    "continued; move it away or choose another path"
                )
            self._write_manifest(manifest)
            return []
        old = self.read_manifest()
        differing = [key for key in _IDENTITY if old.get(key) != manifest[key]]
        if differing:
            raise ValueError(
                f"{self.path} is another set: "
                + ", ".join(
                    f"{key} {old.get(key)} there, {manifest[key]} here" for key in differing
                )
                + "; choose another path, or delete it"
            )
        sequences = self.read()
        self._rewrite(sequences)  # without the rest of a line that was cut off
        self._note_lines(old)
        return sequences

    def append(self, sequence: SampledSequence) -> None:
        """Add one line; if it cannot be written as a whole, remove it again.

        Raises:
            OSError: if the disk is full or the like; what was there stays loadable.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        line = _line(sequence)
        try:
            with self.path.open("a") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            with self.path.open("r+") as file:
                file.truncate(size)
            raise
        self._lines.update(line.encode())
        self._num_lines += 1
        self._note_lines(self.read_manifest())

    def complete(self) -> None:
        """Put the lines in order, and note in the manifest that nothing is missing."""
        sequences = sorted(self.read(), key=lambda sequence: sequence.index)
        # while the order changes no hash is right, and a process may be killed in between
        self._write_manifest({**self.read_manifest(), "sha256": None})
        self._rewrite(sequences)
        self._note_lines({**self.read_manifest(), "is_complete": True})

    def read_manifest(self) -> dict[str, Any]:
        """Return the manifest.

        Raises:
            ValueError: if it is none.
        """
        return read_json(self.manifest_path)

    def read(self) -> list[SampledSequence]:
        """Return the sequences; the last line may be cut off and is left out then.

        Raises:
            ValueError: if another line cannot be read, or if the set was changed.
        """
        if not self.path.exists():
            return []
        content = read_bounded(self.path, MAX_SET_BYTES)
        if self.manifest_path.exists():
            self._check(content, self.read_manifest())
        lines = content.decode(errors="replace").splitlines()
        sequences = []
        for number, line in enumerate(lines, 1):
            try:
                sequences.append(build(SampledSequence, json.loads(line)))
            except BROKEN as error:
                if number < len(lines):
                    raise ValueError(
                        f"{self.path}, line {number}: not a sequence: {sentence(error)}"
                    ) from error
        return sequences

    def _check(self, content: bytes, manifest: dict[str, Any]) -> None:
        """Compare the lines that the manifest knows; a process that was killed leaves one more.

        Raises:
            ValueError: if they were changed.
        """
        expected, num_lines = manifest.get("sha256", ""), manifest.get("num_lines")
        if isinstance(num_lines, int) and not manifest.get("is_complete"):
            content = b"".join(content.splitlines(keepends=True)[:num_lines])
        if expected is not None and expected != hashlib.sha256(content).hexdigest():
            raise ValueError(
                f"{self.path} was changed after it was sampled: its hash is not the one in "
                f"{self.manifest_path.name}; delete the manifest to use it all the same"
            )

    def _rewrite(self, sequences: Iterable[SampledSequence]) -> None:
        lines = [_line(sequence) for sequence in sequences]
        content = "".join(lines)
        write_text(self.path, content)
        self._lines, self._num_lines = hashlib.sha256(content.encode()), len(lines)

    def _note_lines(self, manifest: dict[str, Any]) -> None:
        """Write into the manifest what the lines are that there are by now."""
        known = {"sha256": self._lines.hexdigest(), "num_lines": self._num_lines}
        self._write_manifest({**manifest, **known})

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        self.manifest_path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(manifest, indent=1) + "\n"
        write_text(self.manifest_path, content)


def _line(sequence: SampledSequence) -> str:
    return json.dumps(asdict(sequence)) + "\n"
