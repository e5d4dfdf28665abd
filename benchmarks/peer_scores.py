"""What other bit allocators score an expert by, from their papers and released code.

Each is a loss per expert and option, put where the package's own sensitivities go, so that all of
them are solved by one solver under one budget. ``docs/allocation.md`` says where a peer differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moeq_plugin.core.grid import Grid, choose_grid, dequantize, quantize
from moeq_plugin.models.moe import MoELayer, find_moe_layers

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Weights = Mapping[str, torch.Tensor]


@dataclass
class Seen:
    """Tokens that entered a MoE layer and the gradient of the loss at its experts' output."""

    inputs: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor
    gradient: torch.Tensor


def observe(model: nn.Module, batches: Sequence[torch.Tensor]) -> dict[str, Seen]:
    """Return what every MoE layer of a linearized model saw and what the text's loss thinks."""
    layers = find_moe_layers(model)
    notes: dict[str, list[list[torch.Tensor]]] = {layer.name: [] for layer in layers}

    def hook(layer: MoELayer):
        def note(_experts, args, output):
            entry = [tensor.detach() for tensor in args[:3]]
            notes[layer.name].append(entry)
            output.register_hook(lambda gradient: entry.append(gradient.flatten(0, -2)))

        return note

    handles = [layer.experts.register_forward_hook(hook(layer)) for layer in layers]
    embed = model.get_input_embeddings()
    handles.append(embed.register_forward_hook(lambda _m, _a, output: output.requires_grad_()))
    model.requires_grad_(False)
    with torch.enable_grad():
        for ids in batches:
            log_probs = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
            (-log_probs.gather(2, ids[:, 1:, None]).sum()).backward()
    for handle in handles:
        handle.remove()
    return {name: Seen(*map(torch.cat, zip(*of, strict=True))) for name, of in notes.items()}


def nearest(model: nn.Module, names: Sequence[str], grid: Grid) -> dict[str, torch.Tensor]:
    """Return weights rounded to nearest."""
    rounded = {}
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        scale, zero = choose_grid(weight, grid)
        rounded[name] = dequantize(quantize(weight, scale, zero, grid), scale, zero, grid)
    return rounded


@dataclass
class ExpertErrors:
    """Errors of experts' outputs, times the combine weight, summed over tokens.

    Attributes:
        square: ``[experts, options]``, sum of squares.
        fisher: likewise, each weighted by the squared gradient.
        linear_square: ``[experts, 3, options]`` with one projection rounded at a time.
        layer_fisher: ``[options]`` of the sum over experts of a token.
        load: ``[experts]`` tokens; ``weight`` ``[experts]`` their mean combine weight.
    """

    square: torch.Tensor
    fisher: torch.Tensor
    linear_square: torch.Tensor
    layer_fisher: torch.Tensor
    load: torch.Tensor
    weight: torch.Tensor


@torch.no_grad()
def expert_errors(layer: MoELayer, seen: Seen, options: Sequence[Weights]) -> ExpertErrors:
    """Run every expert of a layer on its tokens with the weights of every option."""
    experts, count = layer.num_experts, len(options)
    found = ExpertErrors(
        torch.zeros(experts, count),
        torch.zeros(experts, count),
        torch.zeros(experts, 3, count),
        torch.zeros(count),
        torch.zeros(experts),
        torch.zeros(experts),
    )
    of_layer = torch.zeros(count, *seen.inputs.shape)
    for e in range(experts):
        tokens, slots = torch.where(seen.index == e)
        c = seen.weights[tokens, slots, None]
        found.load[e], found.weight[e] = len(tokens), c.mean() if len(tokens) else 0
        expert, x = layer.expert(e), seen.inputs[tokens]
        clean = expert(x)
        gradient = seen.gradient[tokens]
        for o, rounded in enumerate(options):
            of_expert = {p: rounded[f"{layer.name}.experts.{e}.{p}"] for p in PROJECTIONS}
            error = c * (_run(expert, of_expert, x) - clean)
            found.square[e, o] = error.square().sum()
            found.fisher[e, o] = (error * gradient).square().sum()
            of_layer[o].index_add_(0, tokens, error)
            for p, projection in enumerate(PROJECTIONS):
                alone = c * (_run(expert, {projection: of_expert[projection]}, x) - clean)
                found.linear_square[e, p, o] = alone.square().sum()
    found.layer_fisher = (of_layer * seen.gradient).square().sum((1, 2))
    return found


def _run(expert: nn.Module, weights: Weights, x: torch.Tensor) -> torch.Tensor:
    state = {f"{projection}.weight": weight for projection, weight in weights.items()}
    return torch.func.functional_call(expert, state, (x,))
