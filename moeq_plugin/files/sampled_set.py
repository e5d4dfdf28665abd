"""A sampled set on disk: a JSON object per sequence and line, and a manifest beside it.

``set.jsonl`` is what any other tool reads; ``set.manifest.json`` says where it comes from. Lines
are written as sequences are finished, so that a set whose sampling was interrupted, or whose disk
ran full, can be loaded and continued.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moeq_plugin.core.sampling import SampledSequence
from moeq_plugin.files.atomic import write_whole
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
        self.manifest_path = path.with_suffix(".manifest.json")

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
        return sequences

    def append(self, sequence: SampledSequence) -> None:
        """Add one line; if it cannot be written as a whole, remove it again.

        Raises:
            OSError: if the disk is full or the like; what was there stays loadable.
        """
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(sequence)) + "\n")
        except OSError:
            with self.path.open("r+") as file:
                file.truncate(size)
            raise

    def complete(self) -> None:
        """Note in the manifest that nothing is missing, and the hash of the lines."""
        self._rewrite(sorted(self.read(), key=lambda sequence: sequence.index))
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self._write_manifest({**self.read_manifest(), "is_complete": True, "sha256": digest})

    def read_manifest(self) -> dict[str, Any]:
        """Return the manifest."""
        return read_json(self.manifest_path)

    def read(self) -> list[SampledSequence]:
        """Return the sequences; the last line may be cut off and is left out then.

        Raises:
            ValueError: if another line cannot be read, or if a complete set was changed.
        """
        if not self.path.exists():
            return []
        content = read_bounded(self.path, MAX_SET_BYTES)
        lines = content.decode().splitlines()
        sequences = []
        for number, line in enumerate(lines, 1):
            try:
                sequences.append(build(SampledSequence, json.loads(line)))
            except BROKEN as error:
                if number < len(lines):
                    raise ValueError(
                        f"{self.path}, line {number}: not a sequence: {sentence(error)}"
                    ) from error
        expected = self.read_manifest().get("sha256") if self.manifest_path.exists() else None
        if expected is not None and expected != hashlib.sha256(content).hexdigest():
            raise ValueError(
                f"{self.path} was changed after it was sampled: its hash is not the one in "
                f"{self.manifest_path.name}; delete the manifest to use it all the same"
            )
        return sequences

    def _rewrite(self, sequences: Iterable[SampledSequence]) -> None:
        lines = "".join(json.dumps(asdict(s)) + "\n" for s in sequences)
        write_whole(self.path, lambda new: new.write_text(lines))

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        self.manifest_path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(manifest, indent=1) + "\n"
        write_whole(self.manifest_path, lambda new: new.write_text(content))
