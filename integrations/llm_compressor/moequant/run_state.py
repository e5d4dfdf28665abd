"""State of a run on disk, layer by layer, so that a killed run goes on where it was.

Every file appears whole or not at all: it is written beside its place, flushed to the disk and
renamed. What has been kept is therefore sound after a kill, a full disk or a power failure. Every
file also holds a digest, or has one beside it, so that what somebody or the disk has changed since
is refused and not built upon.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.distributed import is_source_process
from compressed_tensors.offload import update_offload_parameter
from torch import nn

from moeq_plugin.files.lock import held_directory
from moeq_plugin.files.sealed import SealedFile
from moeq_plugin.files.work_dir import (
    GRADIENTS,
    LAYERS,
    MEASURED,
    RUN_FILE,
    TABLE_FILE,
    TEXT_FILE,
    check_work_dir,
    holds_progress,
    remove_partial,
)
from moeq_plugin.integrations.llm_compressor.allocation.kept_measurements import (
    KeptMeasurements,
)
from moeq_plugin.integrations.llm_compressor.calibration.ranks import gather
from moeq_plugin.integrations.llm_compressor.kept_parts import KeptParts
from moeq_plugin.integrations.llm_compressor.moequant.identity import data_digest
from moeq_plugin.integrations.llm_compressor.moequant.run_file import (
    read_run,
    run_digest,
    write_run,
)
from moeq_plugin.integrations.llm_compressor.unfinished import mark_changed
from moeq_plugin.records.run import Basis, LinearRecord


class RunState:
    """The directory of one run: what the run is, and what it has finished.

    Args:
        path: created while it is :meth:`held`.
        run: what the result depends on beside the data, by name; values that JSON holds.

    Attributes:
        path: of the directory.
        text: where a calibration set that the model writes itself is kept.
        measurements: where sensitivities are kept while they are measured.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any]) -> None:
        self.path = Path(path).absolute()
        self.text = self.path / TEXT_FILE
        self._run = dict(run)
        self._noted: tuple[list[LinearRecord], dict[str, torch.Tensor]] = ([], {})
        self._layers = KeptParts(self.path, LAYERS, self._digest)
        self.measurements = KeptMeasurements(
            gradients=KeptParts(self.path, GRADIENTS, self._digest),
            layers=KeptParts(self.path, MEASURED, self._digest),
            table=SealedFile(self.path / TABLE_FILE),
        )

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

    def note(self, records: Iterable[LinearRecord], modules: Mapping[str, nn.Module]) -> None:
        """Note what has just been finished; it is written by :meth:`keep_noted`.

        Args:
            records: one per finished linear.
            modules: the linears by name.
        """
        for record in records:
            tensors = {
                f"{record.name}.{parameter}": tensor
                for parameter, tensor in modules[record.name].named_parameters(recurse=False)
                if parameter != "bias"  # which quantizing leaves alone
            }
            self.note_tensors(record, tensors)

    def note_tensors(self, record: LinearRecord, tensors: Mapping[str, torch.Tensor]) -> None:
        """Note one module by what stands for its weight.

        Args:
            record: of the module.
            tensors: by name, beginning with the module's.
        """
        records, noted = self._noted
        records.append(record)
        noted |= tensors

    def keep_noted(self) -> None:
        """Write all that was noted since the last time as one part, if there is any.

        Raises:
            OSError: if it cannot be written; nothing kept before is lost.
        """
        (records, tensors), self._noted = self._noted, ([], {})
        if records:
            self._layers.keep([asdict(record) for record in records], tensors)

    def restore(
        self, modules: Mapping[str, nn.Module], later: Container[nn.Module] = ()
    ) -> dict[int, list[LinearRecord]]:
        """Put what was kept of these modules into them; return the records in their order.

        Args:
            modules: the linears by name, schemes attached.
            later: modules that keep their weights until they are :meth:`put`.

        Returns:
            Records by the number of what was finished at once.

        Raises:
            ValueError: if a file is not what was kept.
        """
        records = {}
        for number, (of_part, tensors) in enumerate(self._parts()):
            ours = [record for record in of_part if record.name in modules]
            if ours:
                records[number] = ours
            if not any(modules[record.name] in later for record in ours):
                _put(tensors, modules)
        return records

    def kept_tensors(
        self, names: Container[str]
    ) -> Iterator[tuple[LinearRecord, dict[str, torch.Tensor]]]:
        """Yield what was kept of modules by :meth:`note_tensors`, in its order.

        Args:
            names: of the modules to look for.

        Raises:
            ValueError: if a file is not what was kept.
        """
        for records, tensors in self._parts():
            for record in records:
                if record.name in names:
                    of_module = {
                        key: tensor
                        for key, tensor in tensors.items()
                        if key.rpartition(".")[0] == record.name
                    }
                    yield record, of_module

    def put(self, number: int, modules: Mapping[str, nn.Module]) -> None:
        """Put what was finished at once into the modules.

        Args:
            number: as of :meth:`restore`.
            modules: the linears by name, schemes attached.

        Raises:
            ValueError: if the file is not what was kept.
        """
        _about, tensors = self._layers.part(number)
        _put(tensors, modules)

    def _parts(self) -> Iterator[tuple[list[LinearRecord], dict[str, torch.Tensor]]]:
        for entries, tensors in self._layers:
            yield [LinearRecord(**{**of, "basis": Basis(of["basis"])}) for of in entries], tensors

    def _digest(self) -> str:
        """Return what belongs to this run and to no other."""
        return run_digest(json.loads(json.dumps(self._run)))


def _put(tensors: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module]) -> None:
    for key, tensor in tensors.items():
        name, _, parameter = key.rpartition(".")
        if name not in modules:  # of the same layer, but another phase of the run
            continue
        mark_changed(modules[name])
        update_offload_parameter(modules[name], parameter, tensor)
