"""What the 16-bit stream has for the tokens that the quantized one sends to a linear."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from moeq_plugin.integrations.llm_compressor.calibration.observations import Position
from moeq_plugin.integrations.llm_compressor.two_streams.layer_calls import inputs_of, stopping
from moeq_plugin.integrations.llm_compressor.two_streams.originals import Originals
from moeq_plugin.integrations.llm_compressor.two_streams.stages import Stage

_LEAST_WEIGHT = 0.05


class Counterpart:
    """Both streams' view of the batch that is running, in one stage of a layer.

    Tokens are the same in both, so that rows go by their index in the batch. Which of them reach an
    expert is decided by the quantized stream's router alone.

    Args:
        stage: the stage.
        mlp: the layer's MLP or MoE block.
        originals: 16-bit weights of the layer.
        totals: what all that a MoE block adds up is weighted with together, batch by batch; filled
            in by a stage before the one that reads it.
    """

    def __init__(
        self,
        stage: Stage,
        mlp: nn.Module,
        originals: Originals,
        totals: dict[int, torch.Tensor],
    ) -> None:
        self._stage, self._mlp, self._originals, self._totals = stage, mlp, originals, totals
        self._theirs: dict[nn.Module, torch.Tensor] = {}
        self._ours: dict[nn.Module, torch.Tensor] = {}
        self._batch = 0

    @property
    def writes_residual(self) -> bool:
        """Tell whether the stage's linears write to the residual stream."""
        return self._stage.residual is not None

    @contextlib.contextmanager
    def noting_theirs(self, batch: int) -> Iterator[None]:
        """Note what the 16-bit stream has, which runs a batch while this is entered."""
        self._batch = batch
        self._theirs.clear()
        stage = self._stage
        noted = [stage.source] if stage.source is not None else [*stage.alone, self._mlp]
        noted += [stage.residual] if stage.residual is not None else []
        with self._originals.at_work(), inputs_of(noted, self._theirs):
            yield

    @contextlib.contextmanager
    def noting_ours(self) -> Iterator[None]:
        """Note the residual stream of the quantized model, which runs the same batch."""
        noted = [self._stage.residual] if self._stage.residual is not None else []
        with inputs_of(noted, self._ours):
            yield

    def note_total(self, weights: torch.Tensor) -> None:
        """Note ``[tokens]``, what is added up in the MoE block is weighted with together."""
        self._totals[self._batch] = weights.float().clamp(min=_LEAST_WEIGHT)

    def inputs(
        self, linear: nn.Linear, position: Position | None, tokens: torch.Tensor | None
    ) -> torch.Tensor:
        """Return ``[tokens, in]``, what the linear would receive in the 16-bit stream.

        Args:
            linear: of the stage.
            position: of the linear.
            tokens: indices of those that an expert receives, ``None`` for all.
        """
        if self._stage.source is not None:
            of_all = self._theirs[self._stage.source]
            return of_all if tokens is None else of_all[tokens]
        if position is None or position.expert is None:
            return self._theirs[linear]
        # an expert of the 16-bit model may not have received these tokens: its router is another
        noted: dict[nn.Module, torch.Tensor] = {}
        expert = position.layer.expert(position.expert)
        with self._originals.at_work(expert), inputs_of([linear], noted), stopping(linear):
            expert(self._theirs[self._mlp][tokens])
        return noted[linear]

    def residual(
        self, position: Position | None, tokens: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return ``[tokens, hidden]``, what the 16-bit stream has more where the output is added.

        Of a MoE block all experts of a token make up for it together, each by as much as it takes
        if all do the same.
        """
        norm = self._stage.residual
        if norm is None:
            return None
        change = self._theirs[norm].float() - self._ours[norm].float()
        if position is not None:
            change = change / self._totals[self._batch][:, None]
        return change if tokens is None else change[tokens]
