"""Linear experts that are made from a fused module itself, where the host reads a config.

Configs do not say all: which width an expert has (ERNIE's have two), how its gate is clamped
(MiniMax-M3, Step-3.7), how many experts do nothing (LongCat).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from compressed_tensors.offload import get_cache_init_kwargs, offload_module
from llmcompressor.modeling.moe.linear_experts import ExpertMLPWithGate, LinearExperts2D
from torch import nn

from moeq_plugin.integrations.llm_compressor.linearization.stacks import Stack


class OwnExperts(LinearExperts2D):
    """Experts as the host's, with the arithmetic of the module that they are made from.

    Args:
        experts: the fused module.
        stack: how it is taken apart.
    """

    @torch.no_grad()
    def __init__(self, experts: nn.Module, stack: Stack) -> None:
        found = stack.matrices(experts)
        nn.ModuleList.__init__(self)  # the host's reads a config
        for name, value in vars(experts).items():
            if isinstance(value, int | float):  # what its gate may be clamped with
                setattr(self, name, value)
        apply_gate = getattr(type(experts), "_apply_gate", _apply_gate)
        with torch.device(found.down.device):
            for gate, up, down in zip(found.gate, found.up, found.down, strict=False):
                width, hidden = gate.shape
                expert = ExpertMLPWithGate(
                    hidden, width, False, MethodType(apply_gate, self), down.dtype
                )
                expert.gate_proj.weight.copy_(gate)
                expert.up_proj.weight.copy_(up)
                expert.down_proj.weight.copy_(down)
                self.append(expert)
        idle = range(len(found.down), len(found.gate))
        self.extend(Idle(found.gate[index], found.up[index]) for index in idle)
        self.num_experts = len(self)
        activation = dict(experts.named_modules()).get(stack.activation)
        self.act_fn = activation or nn.SiLU()  # Aria's; MiniMax-M3's gate function needs none
        settings = {} if found.down.is_meta else get_cache_init_kwargs(experts)
        for module in self.modules() if settings else ():
            offload_module(module, **settings)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum of the experts' outputs, in the shape of the input."""
        flat = hidden_states.flatten(0, -2)
        summed: torch.Tensor = super().forward(flat, top_k_index, top_k_weights)
        return summed.view_as(hidden_states)


def _apply_gate(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gated: torch.Tensor = self.act_fn(gate) * up
    return gated


class Idle(nn.Module):
    """An expert that gives back what it gets; its weights are only there to be saved again."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = _Unused(gate), _Unused(up)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the input."""
        return hidden_states


class _Unused(nn.Module):
    """No linear, so that no target means it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
