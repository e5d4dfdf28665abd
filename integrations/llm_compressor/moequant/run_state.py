"""State of a run on disk, layer by layer, so that a killed run goes on where it was.

Every file appears whole or not at all: it is written beside its place, flushed to the disk and
renamed. What has been kept is therefore sound after a kill, a full disk or a power failure. Every
file also holds a digest, or has one beside it, so that what somebody or the disk has changed since
is refused and not built upon.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressed_tensors.distributed import is_source_process
from compressed_tensors.offload import update_offload_parameter
from torch import nn

from moeq_plugin.files.atomic import write_whole
from moeq_plugin.files.lock import held_directory
from moeq_plugin.files.sealed import SealedFile
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
from moeq_plugin.integrations.llm_compressor.moequant.identity import data_digest
from moeq_plugin.integrations.llm_compressor.moequant.kept_layer import KeptLayer
from moeq_plugin.integrations.llm_compressor.moequant.run_file import (
    read_run,
    run_digest,
    write_run,
)
from moeq_plugin.integrations.llm_compressor.unfinished import mark_changed
from moeq_plugin.records.run import LinearRecord


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
        self.table = SealedFile(self.path / TABLE_FILE)
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
        before = read_run(path) if holds_progress(self.path) else {}
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
            write_run(path, {**before, **run})

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
        layer, number = KeptLayer(records, tensors), len(self._layers())
        path = self._layer_path(number)
        try:
            write_whole(path, lambda new: layer.write(new, self._place(number)))
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
        paths = self._layers()
        missing = [path for number, path in enumerate(paths) if path != self._layer_path(number)]
        if missing:
            gone = self._layer_path(paths.index(missing[0]))
            raise ValueError(f"{gone} is not there any more; delete {self.path} to start anew")
        records = []
        for number in range(len(paths)):
            layer = self._read_layer(number, modules)
            records += layer.records
            for key, tensor in layer.tensors.items():
                name, _, parameter = key.rpartition(".")
                mark_changed(modules[name])
                update_offload_parameter(modules[name], parameter, tensor)
        return records

    def _read_layer(self, number: int, modules: Mapping[str, nn.Module]) -> KeptLayer:
        path = self._layer_path(number)
        try:
            layer = KeptLayer.read(path, self._place(number))
            for key in layer.tensors:
                name, _, parameter = key.rpartition(".")
                modules[name].get_parameter(parameter)
        except Exception as error:  # it was whole when it appeared, so somebody changed it since
            raise ValueError(
                f"{path} was changed after it had been kept ({error}); delete {self.path} to start "
                "anew"
            ) from error
        return layer

    def _layer_path(self, number: int) -> Path:
        return self.path / layer_name(number)

    def _place(self, number: int) -> str:
        """Return what a layer belongs to: this run, as its so manieth."""
        return f"{number} {run_digest(json.loads(json.dumps(self._run)))}"

    def _layers(self) -> list[Path]:
        return sorted(self.path.glob("layer-*.safetensors"))
