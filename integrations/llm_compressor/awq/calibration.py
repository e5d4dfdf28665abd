"""What AWQ's search for scales needs to know of a layer's inputs beside their second moments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from llmcompressor.modifiers.transform.awq.mappings import ResolvedMapping
from torch import distributed, nn

from moeq_plugin.integrations.llm_compressor.calibration import ranks
from moeq_plugin.integrations.llm_compressor.calibration.observations import (
    Calibration,
    RegisterHook,
)


@dataclass
class Magnitude:
    """Running mean of what an input's features measure, the direction that scales are tried along.

    Attributes:
        total: ``[in]`` float32, sum of absolute values.
        count: ``[]`` tokens.
    """

    total: torch.Tensor
    count: torch.Tensor


class SmoothingCalibration(Calibration):
    """Also sum up absolute inputs, of the tokens that count: not of padding, not of other experts.

    As in the host's AWQ they are not weighted: they only tell which scales to try, and Eq. 18 of
    arXiv:2505.03804 is about the loss that chooses among them.
    """

    def watch(self, mappings: list[ResolvedMapping], register_hook: RegisterHook) -> None:
        """Register a hook per mapping; call after :meth:`attach`.

        Args:
            mappings: whose inputs to sum up.
            register_hook: the host's ``Modifier.register_hook``.
        """
        self.magnitudes: dict[str, Magnitude] = {}
        for mapping in mappings:
            watched = mapping.activation_hook_target or mapping.balance_layers[0]
            register_hook(watched, self._hook(mapping.smooth_name), "forward")

    def sum_over_ranks(
        self, mappings: list[ResolvedMapping], names: Mapping[nn.Module, str]
    ) -> None:
        """Give every rank the second moments and magnitudes of all.

        Args:
            mappings: those that are watched.
            names: of all modules.
        """
        ranks.sum_over_ranks(self, names)
        seen = {name for part in ranks.gather(list(self.magnitudes)) for name in part}
        for mapping in mappings:
            if mapping.smooth_name not in seen:
                continue  # of another layer
            weight = mapping.balance_layers[0].weight
            nothing = Magnitude(
                torch.zeros(weight.shape[1], device=weight.device),
                torch.zeros((), dtype=torch.int64, device=weight.device),
            )
            magnitude = self.magnitudes.setdefault(mapping.smooth_name, nothing)
            distributed.all_reduce(magnitude.total)
            distributed.all_reduce(magnitude.count)

    def clear_layer(self) -> None:
        """Drop what belongs to the layer that has just been smoothed."""
        super().clear_layer()
        self.magnitudes.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], object], None]:
        def add(module: nn.Module, args: tuple[torch.Tensor, ...], _output: object) -> None:
            rows, _ = self._weigh(args[0].flatten(0, -2), self.seat_of(module))
            total = rows.abs().float().sum(0)
            count = torch.tensor(len(rows), device=total.device)
            so_far = self.magnitudes.get(name)
            if so_far is not None:
                total, count = so_far.total + total, so_far.count + count
            self.magnitudes[name] = Magnitude(total, count)

        return add
