"""What becomes of sampled sequences while a set is sampled: shown, and written as they come."""

from __future__ import annotations

from collections.abc import Callable

from compressed_tensors.distributed import is_source_process
from loguru import logger
from tqdm import tqdm

from moeq_plugin.core.sampling import SampledSequence
from moeq_plugin.files.sampled_set import SampledSetFile
from moeq_plugin.records.progress import Progress, report_progress


class TokenProgress:
    """Shows how many tokens there are of those that are wanted: as a bar, and to listeners."""

    def __init__(self, total: int) -> None:
        self._done, self._total = 0, total
        disable = None if is_source_process() else True
        self._bar = tqdm(total=total, unit="tok", desc="EBSS", disable=disable)

    def advance(self, tokens: int) -> None:
        """Count tokens that have just been sampled."""
        self._done = min(self._done + tokens, self._total)  # coverage may go on for longer
        self._bar.update(tokens)
        report_progress(Progress("sample", self._done, self._total, "tokens"))

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


class SetWriter:
    """Writes sequences as they come; a disk that is full ends the writing, not the sampling."""

    def __init__(self, file: SampledSetFile | None) -> None:
        self._file = file

    def write(self, sequence: SampledSequence) -> None:
        """Add a sequence to the file, if there is one."""
        self._try(lambda file: file.append(sequence))

    def complete(self) -> None:
        """Note that nothing is missing."""
        self._try(SampledSetFile.complete)

    def _try(self, action: Callable[[SampledSetFile], None]) -> None:
        if self._file is None:
            return
        try:
            action(self._file)
        except OSError as error:
            logger.error(
                f"cannot write {self._file.path} ({error}); sampling goes on in memory. The file "
                "keeps what it has, and the same call continues it once there is room"
            )
            self._file = None  # one message, not one for each sequence to come
