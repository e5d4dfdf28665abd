"""Where the matrices of each expert stand in the fused tensors of a module, family by family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Matrices:
    """The matrices of all experts of a layer, as views of the fused tensors where that goes.

    Attributes:
        gate: ``[experts, width, hidden]``; with more experts than ``down`` if the router knows
            some that give back what they get, and have weights that nothing uses (LongCat).
        up: ``[experts, width, hidden]``, likewise.
        down: ``[experts, hidden, width]``.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Stack:
    """What a class of fused experts computes, beyond what its tensors say.

    Attributes:
        matrices: takes its tensors apart.
        activation: name of the module that is applied to the gate.
    """

    matrices: Callable[[Any], Matrices]
    activation: str = "act_fn"


def _rows(experts: Any) -> Matrices:
    """Take apart ``gate_up_proj`` as ``[experts, 2 * width, hidden]``, gates first."""
    gate, up = experts.gate_up_proj.chunk(2, dim=1)
    return Matrices(gate, up, experts.down_proj)


def _columns(experts: Any) -> Matrices:
    """Take apart ``gate_up_proj`` as ``[experts, hidden, 2 * width]``, gates first."""
    gate, up = experts.gate_up_proj.mT.chunk(2, dim=1)
    return Matrices(gate, up, experts.down_proj.mT)


def _flat(experts: Any) -> Matrices:
    """Take apart three tensors in which the experts stand one below the other."""
    shape = (experts.num_experts, experts.ffn_hidden_size, experts.hidden_size)
    gate, up, down = (getattr(experts.mlp, name).view(shape) for name in ("w1", "v1", "w2"))
    return Matrices(gate, up, down.mT)


def _grouped(experts: Any) -> Matrices:
    """Take apart two modules with ``[experts, in, out]``, gates first in the first."""
    gate, up = experts.fc1.weight.mT.chunk(2, dim=1)
    return Matrices(gate, up, experts.fc2.weight.mT)


# by the name of the class, so that no family is imported that is not used
STACKS = {
    "MiniMaxM3VLExperts": Stack(_rows),
    "Step3p7Experts": Stack(_rows),
    "LongcatFlashExperts": Stack(_rows),
    "Llama4TextExperts": Stack(_columns),
    "AriaExperts": Stack(_grouped),
    "DbrxExperts": Stack(_flat, activation="mlp.activation_fn"),
}


def stack_of(experts: nn.Module) -> Stack | None:
    """Return how a module's experts are taken apart, ``None`` if that is not for us to do."""
    return STACKS.get(type(experts).__name__)
