"""Record what routers decide, in the forward that decides it.

The experts' own arguments are read, so that loads and weights are those that the model used,
whatever it does between router and experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from moeq_plugin.models.moe import MoELayer, UnsupportedModelError


class Recorder:
    """Records a forward by hooks while it is entered, and forgets what it recorded at the end."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles += self._listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._forget()

    def _listen(self) -> list[Any]:
        """Register the hooks and return their handles."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Drop what was noted."""
        raise NotImplementedError


class RoutingRecorder(Recorder):
    """Records, while it is entered, the routing of each forward of a model.

    Args:
        layers: the model's MoE layers, of one number of experts.

    Raises:
        UnsupportedModelError: if the layers differ in their number of experts.
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        super().__init__()
        counts = sorted({layer.num_experts for layer in layers})
        if len(counts) != 1:
            raise UnsupportedModelError(
                f"expected MoE layers of one number of experts, got {counts} experts in "
                f"{len(layers)} layers; calibrate this model with a data set"
            )
        self.num_experts = counts[0]
        self._layers = layers
        self._index: dict[int, torch.Tensor] = {}
        self._weights: dict[int, torch.Tensor] = {}

    def _listen(self) -> list[Any]:
        return [
            layer.experts.register_forward_pre_hook(self._hook(number))
            for number, layer in enumerate(self._layers)
        ]

    def _forget(self) -> None:
        self._index.clear()
        self._weights.clear()

    def take_load(self, rows: int) -> torch.Tensor:
        """Return ``[rows, layers, experts]`` int32, the load of the last forward, and forget it.

        Args:
            rows: into how many equal parts its tokens are split, in their order.
        """
        index = self._stacked(self._index).reshape(len(self._layers), rows, -1).transpose(0, 1)
        load = index.new_zeros(rows, len(self._layers), self.num_experts, dtype=torch.int32)
        one = torch.ones((), dtype=torch.int32, device=index.device)
        return load.scatter_add_(2, index, one.expand(index.shape))

    def take_weight_sums(self) -> torch.Tensor:
        """Return ``[2, layers, experts]`` float64 of the last forward, and forget it.

        The sums over tokens of the combine weight and of its square.
        """
        weights = self._stacked(self._weights).flatten(1).double()
        index = self._stacked(self._index).flatten(1)
        sums = weights.new_zeros(2, len(self._layers), self.num_experts)
        sums[0].scatter_add_(1, index, weights)
        sums[1].scatter_add_(1, index, weights.square())
        return sums

    def _hook(self, number: int) -> Any:
        def note(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self._index[number], self._weights[number] = arguments[1], arguments[2]

        return note

    def _stacked(self, noted: dict[int, torch.Tensor]) -> torch.Tensor:
        """Return ``[layers, tokens, top_k]`` in the order of layers, on one device."""
        device = noted[0].device
        return torch.stack([noted[number].to(device) for number in range(len(self._layers))])


@torch.no_grad()
def weight_sums(
    model: nn.Module, layers: Sequence[MoELayer], sequences: Iterable[Sequence[int]]
) -> torch.Tensor:
    """Return ``[2, layers, experts]`` float64: sums of combine weights and of their squares.

    ``sums[0] ** 2 / sums[1]`` is each expert's number of effective tokens.

    Args:
        model: a causal language model.
        layers: its MoE layers.
        sequences: token ids; no sequence gives zeros.
    """
    device = next(model.parameters()).device
    with RoutingRecorder(layers) as recorder:
        total = torch.zeros(2, len(layers), recorder.num_experts, dtype=torch.float64)
        for ids in sequences:
            model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
            total += recorder.take_weight_sums().cpu()
    return total
