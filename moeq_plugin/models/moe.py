"""Find the Mixture-of-Experts layers of a model and trace what their routers decide.

Architectures are recognized by structure, not by name. In transformers >= 5 every MoE block calls
``block.experts(hidden_states, top_k_index, top_k_weights)`` and adds what its shared experts give;
the experts are one module with three-dimensional parameters or, after llm-compressor's
linearization, a list of small MLPs. So the third argument *is* the weight that multiplies the
expert's output, whatever softmax, sigmoid, bias, renormalization or scaling produced it, and
reading it there leaves nothing to recompute. Llama-4 is the exception: its blocks are
remade before they get here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

_ROUTER_NAMES = ("gate", "router")
_SHARED_NAMES = ("shared_expert", "shared_experts")
_SHARED_GATE_NAME = "shared_expert_gate"


class UnsupportedModelError(ValueError):
    """The model's structure is not one that this package can treat without guessing."""


@dataclass(frozen=True)
class MoELayer:
    """One MoE block: the module that owns experts and router.

    Attributes:
        name: the block's module name in the model, such as ``model.layers.3.mlp``.
        block: the block.
        experts: the routed experts, fused or linearized.
        num_experts: how many there are.
        router: scores the experts; ``None`` if the block has none under a known name.
        shared_expert: runs on every token, ``None`` if there is none.
        shared_gate: a linear whose sigmoid multiplies the shared expert's output (Qwen2-MoE and
            its successors), ``None`` where the output is added as it is.
    """

    name: str
    block: nn.Module
    experts: nn.Module
    num_experts: int
    router: nn.Module | None
    shared_expert: nn.Module | None
    shared_gate: nn.Module | None

    def expert(self, index: int) -> nn.Module:
        """Return one expert's MLP.

        Raises:
            TypeError: if the experts are fused; only linearized experts are modules.
        """
        if not isinstance(self.experts, nn.ModuleList):
            raise TypeError(f"{self.name}: the experts are fused; linearize the model first")
        return self.experts[index]

    def shared_weights(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return ``[tokens]``, what multiplies the shared expert's output; ``None`` means 1.

        Args:
            hidden_states: ``[tokens, hidden]`` input of the block.
        """
        if self.shared_gate is None:
            return None
        weight = self.shared_gate.weight
        assert isinstance(weight, torch.Tensor)  # a linear layer has one
        return torch.sigmoid(nn.functional.linear(hidden_states, weight)).flatten()


@dataclass(frozen=True)
class RoutingTrace:
    """What a router decided for one batch of tokens.

    Attributes:
        top_k_index: ``[tokens, top_k]`` int64, the experts of each token.
        top_k_weights: ``[tokens, top_k]``, what multiplies their outputs.
        num_experts: how many experts there are.
    """

    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    num_experts: int

    def combine_weights(self) -> torch.Tensor:
        """Return ``[tokens, experts]``: the weight of each expert's output, 0 if not routed."""
        dense = self.top_k_weights.new_zeros(len(self.top_k_index), self.num_experts)
        return dense.scatter_add_(1, self.top_k_index, self.top_k_weights)

    def of_tokens(self, tokens: torch.Tensor) -> RoutingTrace:
        """Return the decisions for some tokens, given as a mask or as indices."""
        return replace(
            self, top_k_index=self.top_k_index[tokens], top_k_weights=self.top_k_weights[tokens]
        )

    def extended(self, later: RoutingTrace) -> RoutingTrace:
        """Return the decisions for these tokens and then for ``later`` ones."""
        return replace(
            self,
            top_k_index=torch.cat([self.top_k_index, later.top_k_index]),
            top_k_weights=torch.cat([self.top_k_weights, later.top_k_weights]),
        )

    def to(self, device: torch.device) -> RoutingTrace:
        """Return the decisions on a device."""
        return replace(
            self,
            top_k_index=self.top_k_index.to(device),
            top_k_weights=self.top_k_weights.to(device),
        )

    def dispatch(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return for each expert its tokens ``[n]`` and their weights ``[n]``, slot after slot.

        This is the order in which transformers and llm-compressor hand tokens to an expert. The
        released MoEQuant code pairs DeepSeek's tokens with weights listed in another order.
        """
        slots = self.top_k_index.T.flatten()  # slot-major: all first choices come first
        order = slots.argsort(stable=True)
        tokens = order % len(self.top_k_index)
        weights = self.top_k_weights.T.flatten()[order]
        counts = slots.bincount(minlength=self.num_experts).tolist()
        return list(zip(tokens.split(counts), weights.split(counts), strict=True))


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """Return the MoE layers in order of execution; empty for a dense model.

    Raises:
        UnsupportedModelError: if an expert module does not receive its tokens' indices and
            weights, as in Llama-4, where the score multiplies the expert's *input*: there the
            second moments contain the score already and weighting them again would square it.
    """
    return list(_moe_layers(model))


def _moe_layers(model: nn.Module) -> Iterator[MoELayer]:
    for block_name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        num_experts = count_experts(experts) if isinstance(experts, nn.Module) else 0
        if not isinstance(experts, nn.Module) or not num_experts:
            continue
        if len(inspect.signature(experts.forward).parameters) < 3:
            raise UnsupportedModelError(
                f"{block_name}.experts ({type(experts).__name__}) takes hidden states only: the "
                "router's score multiplies the expert's input (Llama-4), so its Hessian "
                "is weighted already and affinity weights would square them. Pass the model as "
                "from_pretrained loads it, whose blocks are taken apart first, or use "
                "llm-compressor's GPTQModifier."
            )
        yield MoELayer(
            name=block_name,
            block=block,
            experts=experts,
            num_experts=num_experts,
            router=_child(block, _ROUTER_NAMES),
            shared_expert=_child(block, _SHARED_NAMES),
            shared_gate=_child(block, (_SHARED_GATE_NAME,)),
        )


def count_experts(experts: nn.Module) -> int:
    """Return how many experts a module holds, 0 if it is not an experts module."""
    first = experts[0] if isinstance(experts, nn.ModuleList) and len(experts) else None
    if isinstance(getattr(first, "down_proj", None), nn.Linear):
        # the activation function is a child of the list as well: do not count with len()
        return int(getattr(experts, "num_experts", len(experts)))  # type: ignore[arg-type]
    fused = getattr(experts, "down_proj", None)
    return len(fused) if isinstance(fused, nn.Parameter) and fused.ndim == 3 else 0


def _child(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    children = (getattr(block, name, None) for name in names)
    return next((child for child in children if isinstance(child, nn.Module)), None)
