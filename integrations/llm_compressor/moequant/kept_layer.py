"""A finished layer on disk: the tensors of its linears, their records, and a digest of both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moeq_plugin.integrations.llm_compressor.moequant.identity import tensor_digest
from moeq_plugin.records.run import Basis, LinearRecord


@dataclass(frozen=True)
class KeptLayer:
    """What a run has finished at once.

    Attributes:
        records: one per finished linear.
        tensors: their weights, scales and zero points, by name.
    """

    records: list[LinearRecord]
    tensors: Mapping[str, torch.Tensor]

    def write(self, path: Path, run: str) -> None:
        """Write a file from which :meth:`read` gets the same again.

        Args:
            path: of the file.
            run: digest of what the run is; the layer of another run is not this one's.
        """
        linears = json.dumps([asdict(record) for record in self.records])
        digest = _digest(linears, self.tensors, run)
        save_file(dict(self.tensors), path, metadata={"linears": linears, "digest": digest})

    @classmethod
    def read(cls, path: Path, run: str) -> KeptLayer:
        """Read a file that :meth:`write` made.

        Raises:
            ValueError: if anything in it is not what was written, or it is of another run.
        """
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
        linears = about["linears"]
        if about.get("digest") != _digest(linears, tensors, run):
            raise ValueError("its digest does not fit")
        entries = json.loads(linears)
        records = [LinearRecord(**{**entry, "basis": Basis(entry["basis"])}) for entry in entries]
        return cls(records, tensors)


def _digest(linears: str, tensors: Mapping[str, torch.Tensor], run: str) -> str:
    lines = [run, linears, *(f"{name} {tensor_digest(tensors[name])}" for name in sorted(tensors))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
