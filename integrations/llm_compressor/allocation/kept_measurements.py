"""What is measured before bits are allocated, kept so that a killed run measures nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.distributed import is_source_process
from torch import nn

from moeq_plugin.files.sealed import SealedFile
from moeq_plugin.integrations.llm_compressor.kept_parts import KeptParts


@dataclass(frozen=True)
class KeptMeasurements:
    """Where measurements are kept, in the order in which they are made.

    Attributes:
        gradients: one part, if gradients are measured at all.
        layers: one part for each layer that was rounded and judged.
        table: of all that was measured.
    """

    gradients: KeptParts
    layers: KeptParts
    table: SealedFile

    def row_weights(
        self,
        names: Mapping[nn.Linear, str],
        measure: Callable[[], Mapping[nn.Linear, torch.Tensor]],
    ) -> dict[nn.Linear, torch.Tensor]:
        """Return mean squared gradients that are kept, or measure and keep them.

        Args:
            names: the linears and their names.
            measure: returns ``[out]`` for each linear; not called if they are kept.

        Raises:
            ValueError: if they were changed since they were kept.
            OSError: if they cannot be kept.
        """
        for _, kept in self.gradients:
            return {linear: kept[name] for linear, name in names.items()}
        measured = dict(measure())
        if is_source_process():
            self.gradients.keep(None, {names[linear]: of for linear, of in measured.items()})
        return measured
