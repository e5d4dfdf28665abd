"""Blocks that differ from those of all other families, made like those.

All others hand an experts module the tokens, the experts of each token and their weights. Children
keep the names that they had.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moeq_plugin.models.moe import UnsupportedModelError


class ScaledInputsBlock(nn.Module):
    """Llama-4's, where the router's score multiplies an expert's input, and not its output.

    Its experts get every token for every expert, zero where it is not routed. Here they get the
    tokens routed to them, with their scores inside and weight one. So their second moments hold the
    score already, as often as the expert's own input does.

    Args:
        block: the block that it is made from.

    Raises:
        UnsupportedModelError: if several experts share a token, which then has several inputs.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        if block.top_k != 1:
            raise UnsupportedModelError(
                f"{type(block).__name__} with {block.top_k} experts per token is not taken apart: "
                "scores multiply the inputs of experts, so that a token has one for each"
            )
        self.experts, self.router = block.experts, block.router
        self.shared_expert = block.shared_expert

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the block's output ``[tokens, hidden]`` and the router's logits."""
        hidden_states = hidden_states.flatten(0, -2)
        scores, logits = self.router(hidden_states)
        best, index = scores.max(dim=-1, keepdim=True)
        routed = self.experts(hidden_states * best, index, torch.ones_like(best))
        output: torch.Tensor = self.shared_expert(hidden_states) + routed
        return output, logits


class LogitsBlock(nn.Module):
    """Aria's, whose experts get the router's logits and choose themselves.

    Args:
        block: the block that it is made from.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.router, self.experts = block.router, block.experts
        self.shared_experts = block.shared_experts
        self.top_k = int(block.config.moe_topk)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the block's output, in the shape of its input."""
        flat = hidden_states.flatten(0, -2)
        best, index = torch.topk(self.router(flat), self.top_k, dim=-1)
        routed: torch.Tensor = self.experts(flat, index, best.softmax(dim=-1))
        output: torch.Tensor = routed.view_as(hidden_states) + self.shared_experts(hidden_states)
        return output


class SplitMLP(nn.Module):
    """MiniMax-M3's dense MLP, gate and up apart, as files and servers have them.

    transformers joins the two while it loads. Saving would part them again, in a quantized weight
    with all that belongs to it.

    Args:
        mlp: the MLP that it is made from.
    """

    @torch.no_grad()
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.alpha, self.limit = mlp.swiglu_alpha, mlp.swiglu_limit
        self.gate_proj, self.up_proj = (
            _linear(weight) for weight in mlp.gate_up_proj.weight.chunk(2)
        )
        self.down_proj = mlp.down_proj

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the MLP's output."""
        gate = self.gate_proj(hidden_states).clamp(max=self.limit)
        up = self.up_proj(hidden_states).clamp(min=-self.limit, max=self.limit)
        output: torch.Tensor = self.down_proj((up + 1) * gate * torch.sigmoid(gate * self.alpha))
        return output


def _linear(weight: torch.Tensor) -> nn.Linear:
    with torch.device(weight.device):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.copy_(weight)
    return linear


# by the name of the class, as the experts in :mod:`.stacks`
BLOCKS = {
    "Llama4TextMoe": ScaledInputsBlock,
    "AriaTextMoELayer": LogitsBlock,
    "MiniMaxM3VLDenseMLP": SplitMLP,
}
