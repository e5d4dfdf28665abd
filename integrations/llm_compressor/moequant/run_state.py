"""State of a run on disk, layer by layer, so that a killed run goes on where it was.

Every file appears whole or not at all: it is written beside its place, flushed to the disk and
renamed. What has been kept is therefore sound after a kill, a full disk or a power failure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.distributed import is_source_process
from compressed_tensors.offload import update_offload_parameter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from moeq_plugin.files.atomic import write_text, write_whole
from moeq_plugin.files.lock import held_directory
from moeq_plugin.files.work_dir import (
    RUN_FILE,
    TABLE_FILE,
    TEXT_FILE,
    check_work_dir,
    holds_progress,
    layer_name,
    remove_partial,
)
from moeq_plugin.integrations.llm_compressor.calibration.ranks import gather
from moeq_plugin.records.run import Basis, LinearRecord

_SAMPLED_ELEMENTS = 2**16  # of every parameter


class RunState:
    """The directory of one run: what the run is, and what it has finished.

    Args:
        path: created while it is :meth:`held`.
        run: what the result depends on beside the data, by name; values that JSON holds.

    Attributes:
        path: of the directory.
        text: where a calibration set that the model writes itself is kept.
        table: where measured sensitivities are kept.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any]) -> None:
        self.path = Path(path).absolute()
        self.text = self.path / TEXT_FILE
        self.table = self.path / TABLE_FILE
        self._run = dict(run)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of the directory; ranks of one run are one process here.

        Raises:
            ValueError: if another process works there, or it holds files of something else.
        """
        check_work_dir(self.path)
        if not is_source_process():
            yield
            return
        with held_directory(self.path):
            yield

    def begin(self, data: Iterable[Mapping[str, Any]] | None) -> None:
        """Make sure that the directory holds this run or none.

        Args:
            data: calibration batches; ``None`` if the model has yet to write them.

        Raises:
            ValueError: naming what differs from the run whose state is there.
            OSError: if the directory cannot be written.
        """
        if data is not None:
            # of every rank's part, in their order: all ranks come here
            self._run["data"] = gather(data_digest(data))
        run = json.loads(json.dumps(self._run))  # as it will be read: tuples are lists by then
        check_work_dir(self.path)
        path = self.path / RUN_FILE
        # a run that has finished nothing has nothing to lose, whatever it was
        before = json.loads(path.read_text()) if holds_progress(self.path) else {}
        changed = [name for name in run if name in before and before[name] != run[name]]
        if changed:
            lines = [f"  - {name}: was {before[name]!r}, is {run[name]!r}" for name in changed]
            raise ValueError(
                f"work_dir {self.path} belongs to another run and was left as it is. Use the same "
                "model, data, settings and versions to continue it, or another directory to start "
                "anew. What differs:\n" + "\n".join(lines)
            )
        if is_source_process():
            remove_partial(self.path)
            # what was known before stays: without data this comes once before the text is written
            # and once after
            content = json.dumps({**before, **run}, indent=1) + "\n"
            write_text(path, content)

    def keep(self, records: list[LinearRecord], modules: Mapping[str, nn.Module]) -> None:
        """Write what has just been finished.

        Args:
            records: one per finished linear.
            modules: the linears by name.

        Raises:
            OSError: if it cannot be written; nothing kept before is lost.
        """
        tensors = {
            f"{record.name}.{parameter}": tensor.detach().contiguous().cpu()
            for record in records
            for parameter, tensor in modules[record.name].named_parameters(recurse=False)
            if parameter != "bias"  # which quantizing leaves alone
        }
        about = {"linears": json.dumps([asdict(record) for record in records])}
        path = self.path / layer_name(len(self._layers()))
        try:
            write_whole(path, lambda new: save_file(tensors, new, metadata=about))
        except Exception as error:
            raise OSError(
                f"cannot keep the state of {len(records)} linears in {path}: {error}. What was "
                "kept before is sound: make room or give access, and run the same again"
            ) from error

    def restore(self, modules: Mapping[str, nn.Module]) -> list[LinearRecord]:
        """Put everything that was kept into the modules; return the records in their order.

        Args:
            modules: the linears by name, schemes attached.

        Raises:
            ValueError: if a file is not what was kept.
        """
        return [record for path in self._layers() for record in self._restore_layer(path, modules)]

    def _restore_layer(self, path: Path, modules: Mapping[str, nn.Module]) -> list[LinearRecord]:
        try:
            with safe_open(path, framework="pt") as file:
                entries = json.loads(file.metadata()["linears"])
                for key in file.keys():  # noqa: SIM118 - not a dict
                    name, _, parameter = key.rpartition(".")
                    update_offload_parameter(modules[name], parameter, file.get_tensor(key))
            return [LinearRecord(**{**entry, "basis": Basis(entry["basis"])}) for entry in entries]
        except Exception as error:  # it was whole when it appeared, so somebody changed it since
            raise ValueError(
                f"{path} was changed after it had been kept ({error}); delete {self.path} to start "
                "anew"
            ) from error

    def _layers(self) -> list[Path]:
        return sorted(self.path.glob("layer-*.safetensors"))


def model_digest(model: nn.Module) -> str:
    """Return a digest of a model: names, shapes, types and up to 65,536 elements of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // _SAMPLED_ELEMENTS)].contiguous().cpu()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def data_digest(batches: Iterable[Mapping[str, Any]]) -> str:
    """Return a digest of calibration batches, in their order.

    Raises:
        ValueError: if the order changes from one pass over the data to the next.
    """
    first, second = _digest_of(batches), _digest_of(batches)
    if first != second:
        raise ValueError(
            "work_dir needs calibration data that come in the same order every time, or a run "
            "could not be continued: use shuffle_calibration_samples=False and a DataLoader "
            "without shuffling"
        )
    return first


def _digest_of(batches: Iterable[Mapping[str, Any]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(name.encode())
            digest.update(str(torch.as_tensor(batch[name]).tolist()).encode())
    return digest.hexdigest()
