"""Do errors of experts that work on the same tokens add up, cancel or leave each other alone?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from llmcompressor.modifiers.utils.hooks import HooksMixin
from torch import nn

from moeq_plugin.core.correlation import accumulate_cross_terms, certificate, coactivation
from moeq_plugin.core.sensitivity import LayerInteraction
from moeq_plugin.integrations.llm_compressor.calibration.observations import Calibration
from moeq_plugin.integrations.llm_compressor.calibration.token_sample import TokenSample
from moeq_plugin.integrations.llm_compressor.checkpoint.reader_limits import expert_linears
from moeq_plugin.models.moe import MoELayer, RoutingTrace

_ERROR_VALUES = 1 << 25  # held at once: 128 MiB in float32


class Interactions:
    """Measures, layer by layer, how errors of experts interact.

    Args:
        layers: the MoE layers to measure; none, to measure nothing.

    Attributes:
        linears: those whose weights at every option are needed for it.
        found: by name of the layer.
    """

    def __init__(self, layers: Iterable[MoELayer]) -> None:
        self._layers = list(layers)
        self.linears = frozenset(m for layer in self._layers for m in expert_linears(layer))
        self.found: dict[str, LayerInteraction] = {}

    def measure(
        self,
        calibration: Calibration,
        rounded: Mapping[nn.Linear, Sequence[torch.Tensor]],
        row_weights: Mapping[nn.Linear, torch.Tensor] | None,
    ) -> None:
        """Measure the layers whose experts have been rounded.

        Args:
            calibration: holds samples of the tokens of the layer that has just run.
            rounded: the weights of its experts' linears at every option, in one order.
            row_weights: ``[out]`` sensitivities of each linear's outputs; ``None`` means 1.
        """
        for layer in self._layers:
            output = layer.expert(0).down_proj
            sample = calibration.samples.get(layer.experts)
            if not isinstance(output, nn.Linear) or output not in rounded or sample is None:
                continue  # another layer than the one that has just run
            weights = None if row_weights is None else row_weights[output]
            found = measure_interaction(layer, sample, rounded, weights)
            if found is not None:
                self.found[layer.name] = found


@torch.no_grad()
def measure_interaction(
    layer: MoELayer,
    sample: TokenSample,
    rounded: Mapping[nn.Linear, Sequence[torch.Tensor]],
    sensitivity: torch.Tensor | None,
) -> LayerInteraction | None:
    """Run a layer's experts on a sample of its tokens with the weights of every option.

    Args:
        layer: the MoE layer, original weights in place.
        sample: tokens of the layer with their routing.
        rounded: the weights of its experts' linears at every option, in one order.
        sensitivity: ``[hidden]`` weights of the squared output error; ``None`` means 1.

    Returns:
        ``None`` if an option does not fit all linears, or no token was seen.
    """
    experts = [layer.expert(index) for index in range(layer.num_experts)]
    counts = {len(rounded.get(linear, ())) for linear in expert_linears(layer)}
    if sample.rows is None or sample.routing is None or len(counts) != 1 or counts == {0}:
        return None
    options, hidden = counts.pop(), sample.rows.shape[1]
    top_k = sample.routing.top_k_index.shape[1]
    some = torch.arange(min(len(sample.rows), _ERROR_VALUES // (top_k * options * hidden) or 1))
    rows, routing = sample.rows[some], sample.routing.of_tokens(some.to(sample.rows.device))
    with HooksMixin.disable_hooks():  # these tokens have been observed already
        errors = _weighted_errors(experts, rows, routing, rounded, options)
    if sensitivity is not None:
        errors *= sensitivity.sqrt().to(errors)
    size = (layer.num_experts, options)
    Q = torch.zeros(*size, *size, dtype=torch.float64, device=rows.device)
    accumulate_cross_terms(Q, errors, routing.top_k_index)
    found = certificate(Q)
    return LayerInteraction(
        eigenvalue=found.eigenvalue,
        factor=found.factor if math.isfinite(found.factor) else None,
        coactivation=coactivation(routing.top_k_index, layer.num_experts).tolist(),
    )


def _weighted_errors(
    experts: Sequence[nn.Module],
    rows: torch.Tensor,
    routing: RoutingTrace,
    rounded: Mapping[nn.Linear, Sequence[torch.Tensor]],
    options: int,
) -> torch.Tensor:
    """Return ``[tokens, top_k, options, hidden]`` float32 errors times combine weights."""
    top_k = routing.top_k_index.shape[1]
    errors = torch.zeros(len(rows), top_k, options, rows.shape[1], device=rows.device)
    for index, expert in enumerate(experts):
        tokens, slots = torch.where(routing.top_k_index == index)
        inputs, weights = rows[tokens], routing.top_k_weights[tokens, slots, None].float()
        original = expert(inputs).float()  # the weights in place are those of 16 bits all the time
        linears = [m for m in expert.modules() if isinstance(m, nn.Linear)]
        for option in range(options):
            with _computing_with({linear: rounded[linear][option] for linear in linears}):
                output = expert(inputs).float()
            errors[tokens, slots, option] = (output - original) * weights
    return errors


@contextlib.contextmanager
def _computing_with(weights: Mapping[nn.Linear, torch.Tensor]) -> Iterator[None]:
    """Let linears compute with other weights.

    By their outputs, and not by swapping parameters: where the host offloads a module, what is
    assigned to its parameter is written over what it holds.
    """

    def replace(linear: nn.Linear, args: tuple[torch.Tensor], _output: object) -> torch.Tensor:
        return nn.functional.linear(args[0], weights[linear], linear.bias)

    handles = [linear.register_forward_hook(replace) for linear in weights]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
