"""How far two models route the same tokens to the same experts.

What is compared is what the models did: the indices that their experts received and the logits
that their routers returned, fused or linearized alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moeq_plugin.models.moe import MoELayer, UnsupportedModelError, find_moe_layers
from moeq_plugin.models.routing import Recorder
from moeq_plugin.models.stderr import mean_and_stderr


@dataclass(frozen=True)
class LayerAgreement:
    """Agreement in one MoE layer; means over tokens, errors over sequences.

    Attributes:
        name: of the layer, in the model.
        jaccard: of the two sets of a token's experts, common by all; 1 where they are the same.
        jaccard_stderr: its standard error.
        router_kl: ``KL(reference || model)`` of the softmax of the router's logits, in nats,
            whatever the family does with these; ``None`` where no router was called.
        router_kl_stderr: its standard error.
        load: ``[experts]``, slots that each expert received in the model.
        reference_load: likewise in the reference.
    """

    name: str
    jaccard: float
    jaccard_stderr: float
    router_kl: float | None
    router_kl_stderr: float | None
    load: tuple[int, ...]
    reference_load: tuple[int, ...]


@dataclass(frozen=True)
class RoutingAgreement:
    """Agreement in all MoE layers, and their mean.

    Attributes:
        layers: in order of execution.
        jaccard: mean over layers.
        jaccard_stderr: its standard error; layers see the same sequences, so this is not the mean
            of the layers' errors.
        router_kl: mean over layers; ``None`` unless every layer has one.
        router_kl_stderr: its standard error.
    """

    layers: tuple[LayerAgreement, ...]
    jaccard: float
    jaccard_stderr: float
    router_kl: float | None
    router_kl_stderr: float | None

    @property
    def worst(self) -> LayerAgreement:
        """Return the layer that agrees least."""
        return min(self.layers, key=lambda layer: layer.jaccard)


class RouterRecorder(Recorder):
    """Notes, while it is entered, the experts' indices and the routers' logits of a forward."""

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        super().__init__()
        self._layers = layers
        self._noted: dict[tuple[str, int], torch.Tensor] = {}

    def _listen(self) -> list[Any]:
        handles: list[Any] = []
        for number, layer in enumerate(self._layers):
            handles.append(layer.experts.register_forward_pre_hook(self._on_experts(number)))
            if layer.router is not None:
                handles.append(layer.router.register_forward_hook(self._on_router(number)))
        return handles

    def _forget(self) -> None:
        self._noted.clear()

    def take(self, rows: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return each layer's ``[rows, tokens, top_k]`` indices and logits, and forget them."""
        noted, self._noted = self._noted, {}
        found = []
        for number in range(len(self._layers)):
            index, logits = noted["index", number], noted.get(("logits", number))
            of_rows = None if logits is None else logits.float().reshape(rows, -1, logits.shape[-1])
            found.append((index.reshape(rows, -1, index.shape[-1]), of_rows))
        return found

    def _on_experts(self, number: int) -> Any:
        def note(_module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            self._noted["index", number] = arguments[1]

        return note

    def _on_router(self, number: int) -> Any:
        def note(_module: nn.Module, _arguments: Any, result: Any) -> None:
            # routers return (logits, weights, indices); one that is a plain linear, logits
            self._noted["logits", number] = result[0] if isinstance(result, tuple) else result

        return note


class RoutingComparison:
    """Adds up agreement batch by batch; what it keeps are numbers per sequence and layer.

    Args:
        layers: the MoE layers of the model.
        reference_layers: as many of the reference.
    """

    def __init__(self, layers: Sequence[MoELayer], reference_layers: Sequence[MoELayer]) -> None:
        self.model_recorder = RouterRecorder(layers)
        self.reference_recorder = RouterRecorder(reference_layers)
        self._layers = layers
        self._jaccard: list[list[torch.Tensor]] = [[] for _ in layers]
        self._router_kl: list[list[torch.Tensor]] = [[] for _ in layers]
        self._load = [torch.zeros(2, layer.num_experts, dtype=torch.int64) for layer in layers]

    def add(
        self,
        ours: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
        theirs: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    ) -> None:
        """Add what the recorders took from one batch."""
        for number, ((index, logits), (other, other_logits)) in enumerate(
            zip(ours, theirs, strict=True)
        ):
            other = other.to(index.device)
            num_experts = self._layers[number].num_experts
            self._jaccard[number].append(jaccard(index, other, num_experts).mean(1).cpu())
            for load, chosen in zip(self._load[number], (index, other), strict=True):
                load += chosen.flatten().bincount(minlength=num_experts).cpu()
            if logits is not None and other_logits is not None:
                p = other_logits.to(logits.device).log_softmax(-1)
                divergence = (p.exp() * (p - logits.log_softmax(-1))).sum(-1)
                self._router_kl[number].append(divergence.mean(1).cpu())

    def result(self) -> RoutingAgreement:
        """Return the agreement over everything added."""
        jaccards = torch.stack([torch.cat(batches) for batches in self._jaccard])
        divergences = [torch.cat(batches) if batches else None for batches in self._router_kl]
        layers = []
        for number, layer in enumerate(self._layers):
            load, reference_load = (tuple(of.tolist()) for of in self._load[number])
            layers.append(
                LayerAgreement(
                    layer.name,
                    *mean_and_stderr(jaccards[number]),
                    *_mean_if_any(divergences[number]),
                    load,
                    reference_load,
                )
            )
        known = [found for found in divergences if found is not None]
        overall = torch.stack(known).mean(0) if len(known) == len(divergences) else None
        return RoutingAgreement(
            tuple(layers), *mean_and_stderr(jaccards.mean(0)), *_mean_if_any(overall)
        )


def compare_routing(model: nn.Module, reference: nn.Module) -> RoutingComparison | None:
    """Return what compares the two, ``None`` unless both have the same MoE layers."""
    layers, reference_layers = _layers_of(model), _layers_of(reference)
    sizes = [[layer.num_experts for layer in found] for found in (layers, reference_layers)]
    if not layers or sizes[0] != sizes[1]:
        return None
    return RoutingComparison(layers, reference_layers)


def jaccard(index: torch.Tensor, other: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return for each token how many experts of two sets are common, by how many there are.

    Args:
        index: ``[..., top_k]`` int64, the experts of each token.
        other: likewise; the number of experts per token may differ.
        num_experts: how many there are.

    Example:
        >>> jaccard(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [3, 4]]), 5)
        tensor([1.0000, 0.3333])
    """
    ours, theirs = (
        torch.zeros(*x.shape[:-1], num_experts, dtype=torch.bool, device=x.device).scatter(
            -1, x, True
        )
        for x in (index, other)
    )
    return (ours & theirs).sum(-1) / (ours | theirs).sum(-1)


def _layers_of(model: nn.Module) -> list[MoELayer]:
    try:
        return find_moe_layers(model)
    except UnsupportedModelError:  # its experts do not see what they were chosen for
        return []


def _mean_if_any(of_sequences: torch.Tensor | None) -> tuple[float | None, float | None]:
    return (None, None) if of_sequences is None else mean_and_stderr(of_sequences)
