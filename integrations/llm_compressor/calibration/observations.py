"""Collect token-weighted second moments while the host runs its calibration pass.

Linears that receive the same tensor with the same weights (gate and up of an expert; q, k and v)
share one :class:`Observation`. Experts see only the tokens routed to them: a token that is not
routed has weight zero, so computing it, as the host does by default, changes nothing but the time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.distributed import is_distributed
from llmcompressor.modeling.moe.context import get_calibrate_all_experts_flag
from torch import distributed, nn

from moeq_plugin.core.hessian import SecondMoments
from moeq_plugin.integrations.llm_compressor.calibration.data_split import Part
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.integrations.llm_compressor.calibration.shared_inputs import SharedInputs
from moeq_plugin.integrations.llm_compressor.calibration.token_sample import TokenSample
from moeq_plugin.models.moe import MoELayer, RoutingTrace

RegisterHook = Callable[..., object]


@dataclass(frozen=True)
class Position:
    """Where a linear sits in a MoE layer.

    Attributes:
        layer: the layer.
        expert: index of the routed expert, ``None`` for the shared expert.
    """

    layer: MoELayer
    expert: int | None


@dataclass
class Observation:
    """Second moments of one input and the linears that receive it.

    Attributes:
        moments: what was accumulated.
        linears: the linears, in order of first call.
        position: where they sit, ``None`` outside MoE layers.
    """

    moments: SecondMoments
    linears: list[nn.Linear]
    position: Position | None


class Calibration:
    """Hooks that turn a forward pass into :class:`Observation` objects.

    Args:
        affinity_power: power of the router's combine weight that weights a token.
        weight_gate_proj: whether gate projections are weighted too.
        seed: seed of the token samples.
        padding: knows which tokens do not count.
    """

    def __init__(
        self,
        *,
        affinity_power: float,
        weight_gate_proj: bool,
        seed: int,
        padding: PaddingWatch | Part,
    ) -> None:
        self.affinity_power = affinity_power
        self.weight_gate_proj = weight_gate_proj
        self.observations: dict[nn.Linear, Observation] = {}
        self.samples: dict[nn.Module, TokenSample] = {}
        self._seed = seed
        self._padding = padding
        self._positions: dict[nn.Module, Position] = {}
        self._dispatch: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._shared_weights: dict[nn.Module, torch.Tensor | None] = {}
        self._shared_inputs = SharedInputs()
        self._parents: dict[nn.Module, nn.Module] = {}
        self._num_tokens = 0  # of the batch that the running experts received

    def attach(
        self,
        model: nn.Module,
        layers: list[MoELayer],
        linears: list[nn.Linear],
        register_hook: RegisterHook,
    ) -> None:
        """Register all hooks.

        Args:
            model: the model that will run.
            layers: its MoE layers.
            linears: the linears to observe.
            register_hook: the host's ``Modifier.register_hook``.
        """
        self._parents = {child: parent for parent in model.modules() for child in parent.children()}
        register_hook(model, self._padding.read, "forward_pre", with_kwargs=True)
        for layer in layers:
            self._take_positions(layer)
            # before the experts run: their linears see rows without knowing which tokens those are
            register_hook(layer.experts, self._open_experts, "forward_pre")
            if layer.shared_expert is not None:
                register_hook(layer.shared_expert, self._open_shared_expert, "forward_pre")
        for linear in linears:
            register_hook(linear, self._observe, "forward")

    def position_of(self, linear: nn.Module) -> Position | None:
        """Return where a linear sits, ``None`` outside MoE layers."""
        return self._positions.get(linear)

    def no_tokens(self, linear: nn.Linear, num_inputs: int, device: torch.device) -> SecondMoments:
        """Return moments of a linear that has seen no token."""
        return SecondMoments.zeros(num_inputs, device)

    def samples_by_name(self) -> dict[str, TokenSample]:
        """Return the samples by the names of their layers."""
        return {
            # any expert's position names the layer; the list of experts has none itself
            self._positions[experts[0]].layer.name: sample  # type: ignore[index]
            for experts, sample in self.samples.items()
        }

    def check_finite(self, names: Mapping[nn.Module, str]) -> None:
        """Refuse second moments that no weights could be fitted to.

        Args:
            names: of the linears.

        Raises:
            ValueError: naming the linears whose inputs are not finite.
        """
        for observation in self.observations.values():
            if not observation.moments.hessian.diagonal().isfinite().all():
                wrong = ", ".join(names[linear] for linear in observation.linears)
                raise ValueError(
                    f"the inputs of {wrong} contain NaN or infinity, the first linears in order "
                    "of execution where that happens. Nothing was saved. Check the model in this "
                    "dtype on this data; layers before this one are sound."
                )

    def clear_layer(self) -> None:
        """Drop what belongs to the layer that has just been compressed."""
        self.observations.clear()
        self.samples.clear()
        self._dispatch.clear()
        self._shared_weights.clear()
        self._shared_inputs.clear()

    def _take_positions(self, layer: MoELayer) -> None:
        for index in range(layer.num_experts):
            for module in layer.expert(index).modules():
                self._positions[module] = Position(layer, index)
        for module in layer.shared_expert.modules() if layer.shared_expert else ():
            self._positions[module] = Position(layer, None)

    def _open_experts(self, experts: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        hidden_states, top_k_index, top_k_weights = args[:3]
        hidden_states = hidden_states.flatten(0, -2)
        self._num_tokens = len(hidden_states)
        position = self._positions[experts[0]]  # type: ignore[index]
        trace = RoutingTrace(top_k_index, top_k_weights, position.layer.num_experts)
        self._dispatch[experts] = trace.dispatch()
        if experts not in self.samples:
            # of this layer, so that a run that begins here draws what a whole run draws, and of
            # this rank, so that ranks draw differently
            rank = distributed.get_rank() if is_distributed() else 0
            layer_seed = random.Random(f"{self._seed}/{position.layer.name}/{rank}").getrandbits(63)
            self.samples[experts] = TokenSample(torch.Generator().manual_seed(layer_seed))
        sample = self.samples[experts]
        keep = self._padding.keep(len(hidden_states))
        if keep is not None:
            keep = keep.to(hidden_states.device)
            hidden_states, trace = hidden_states[keep], trace.of_tokens(keep)
        sample.add(hidden_states, trace)

    def _open_shared_expert(self, shared: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        hidden_states = args[0].flatten(0, -2)
        self._shared_weights[shared] = self._positions[shared].layer.shared_weights(hidden_states)

    def _observe(
        self, linear: nn.Linear, args: tuple[torch.Tensor, ...], _output: torch.Tensor
    ) -> None:
        inputs = args[0]
        weighted = self.weight_gate_proj or not self._is_gate_proj(linear)
        is_new = not self._shared_inputs.knows(linear)
        leader = self._shared_inputs.leader_of(
            linear, (self._parents.get(linear), weighted), inputs
        )
        if leader is None:
            return
        if leader is not linear:
            if is_new:
                self.observations[leader].linears.append(linear)
            return
        if linear not in self.observations:
            moments = self.no_tokens(linear, inputs.shape[-1], inputs.device)
            position = self._positions.get(linear)
            self.observations[linear] = Observation(moments, [linear], position)
        power = self.affinity_power if weighted else 0.0
        self._add(self.observations[linear], inputs.flatten(0, -2), power)

    def _add(self, observation: Observation, inputs: torch.Tensor, power: float) -> None:
        """Add ``[tokens, in]`` inputs, as the observation's first linear receives them."""
        rows, weights = self._weigh(inputs, observation.position)
        if weights is not None:
            weights = weights.float().abs().pow(power)
        observation.moments.add(rows, weights)

    def _is_gate_proj(self, linear: nn.Linear) -> bool:
        parent = self._parents.get(linear)
        return linear in self._positions and getattr(parent, "gate_proj", None) is linear

    def _weigh(
        self, inputs: torch.Tensor, position: Position | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the rows that count and their combine weights, padding removed."""
        if position is not None and position.expert is not None:
            tokens, weights = self._dispatch[position.layer.experts][position.expert]
            # the host's flag, as it is while this expert runs: with it every token is here, without
            # it only those that were dispatched, in the order of the dispatch
            if get_calibrate_all_experts_flag():
                inputs = inputs[tokens]
            # asked for the whole batch: an expert's rows alone do not say which tokens they are
            keep = self._padding.keep(self._num_tokens)
            if keep is None:
                return inputs, weights
            keep = keep.to(tokens.device)[tokens]
            return inputs[keep], weights[keep]
        shared_weights: torch.Tensor | None = None
        if position is not None and position.layer.shared_expert is not None:
            shared_weights = self._shared_weights[position.layer.shared_expert]
        keep = self._padding.keep(len(inputs))
        if keep is None:
            return inputs, shared_weights
        keep = keep.to(inputs.device)
        return inputs[keep], None if shared_weights is None else shared_weights[keep]
