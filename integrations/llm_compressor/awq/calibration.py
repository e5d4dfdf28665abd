"""Sum up what AWQ's search for scales needs to know, while the host runs its calibration pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from llmcompressor.modifiers.transform.awq.mappings import ResolvedMapping
from torch import distributed, nn

from moeq_plugin.integrations.llm_compressor.awq.layer_inputs import (
    LayerInputs,
    Magnitude,
    Moments,
)
from moeq_plugin.integrations.llm_compressor.calibration import rank_moments, ranks
from moeq_plugin.integrations.llm_compressor.calibration.guard import guard
from moeq_plugin.integrations.llm_compressor.calibration.observations import (
    Calibration,
    RegisterHook,
)
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.integrations.llm_compressor.schemes import weight_of


class SmoothingCalibration(Calibration):
    """Also sum up absolute inputs, of the tokens that count: not of padding, not of other experts.

    As in the host's AWQ they are not weighted: they only tell which scales to try, and Eq. 18 of
    arXiv:2505.03804 is about the loss that chooses among them.

    Args:
        affinity_power: power of the router's combine weight that weights a token.
        seed: of the samples of layer tokens.
        padding: knows which tokens do not count.
    """

    def __init__(self, *, affinity_power: float, seed: int, padding: PaddingWatch) -> None:
        super().__init__(
            affinity_power=affinity_power, weight_gate_proj=True, seed=seed, padding=padding
        )
        self._magnitudes: dict[str, Magnitude] = {}

    def watch(self, mappings: Iterable[ResolvedMapping], register_hook: RegisterHook) -> None:
        """Register a hook per mapping; call after :meth:`attach`.

        Args:
            mappings: whose inputs to sum up.
            register_hook: the host's ``Modifier.register_hook``.
        """
        for mapping in mappings:
            watched = mapping.activation_hook_target or mapping.balance_layers[0]
            register_hook(watched, self._hook(mapping.smooth_name), "forward")

    def sum_over_ranks(
        self, mappings: Iterable[ResolvedMapping], names: Mapping[nn.Module, str]
    ) -> None:
        """Give every rank the second moments and magnitudes of all.

        Args:
            mappings: those that are watched.
            names: of all modules.
        """
        rank_moments.sum_over_ranks(self, names)
        seen = {name for part in ranks.gather(list(self._magnitudes)) for name in part}
        for mapping in mappings:
            if mapping.smooth_name not in seen:
                continue  # of another layer
            weight = weight_of(mapping.balance_layers[0])
            nothing = Magnitude(
                torch.zeros(weight.shape[1], device=weight.device),
                torch.zeros((), dtype=torch.int64, device=weight.device),
            )
            magnitude = self._magnitudes.setdefault(mapping.smooth_name, nothing)
            distributed.all_reduce(magnitude.total)
            distributed.all_reduce(magnitude.count)

    def layer_inputs(self, min_effective_tokens: float | None) -> LayerInputs:
        """Return what the layer's inputs are like; starved experts borrow from the layer.

        Args:
            min_effective_tokens: below which an expert borrows, ``None`` for its number of inputs.
        """
        moments: dict[nn.Linear, Moments] = {}
        for observation in self.observations.values():
            hessian, weight_sum, basis = guard(
                observation, self, min_effective_tokens=min_effective_tokens, shrinkage=1.0
            )
            of_input = Moments(hessian, weight_sum, basis, observation.moments.effective_tokens)
            moments.update(dict.fromkeys(observation.linears, of_input))
        return LayerInputs(moments, dict(self._magnitudes))

    def is_weighted(self, linear: nn.Linear) -> bool:
        """Tell whether the router or a shared expert's gate weights what this linear receives."""
        position = self.position_of(linear)
        if position is None or self.affinity_power == 0:
            return False
        return position.expert is not None or position.layer.shared_gate is not None

    def clear_layer(self) -> None:
        """Drop what belongs to the layer that has just been smoothed."""
        super().clear_layer()
        self._magnitudes.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], object], None]:
        def add(module: nn.Module, args: tuple[torch.Tensor, ...], _output: object) -> None:
            rows, _ = self._weigh(args[0].flatten(0, -2), self.position_of(module))
            total = rows.abs().float().sum(0)
            count = torch.tensor(len(rows), device=total.device)
            so_far = self._magnitudes.get(name)
            if so_far is not None:
                total, count = so_far.total + total, so_far.count + count
            self._magnitudes[name] = Magnitude(total, count)

        return add
