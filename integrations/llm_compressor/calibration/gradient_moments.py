"""Gradients at the outputs of linears while a layer runs backward, and their second moments.

Every token counts the same, however large its gradient. A first token that all others attend to has
gradients at its keys, its values and its down projection that are thousands of times as large as
others have, and rows would make up for each other as it alone needs it: its input is one of many.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

from moeq_plugin.integrations.llm_compressor.calibration.shared_inputs import SharedInputs

_NO_GRADIENT = 1e-18  # the square of less is no normal float32


class GradientMoments:
    """Hooks that catch gradients; linears with one input are caught together.

    Args:
        linears: to listen to, by name.

    Attributes:
        moments: ``[out, out]`` float32, ``sum_t g_t g_t^T / |g_t|^2`` over the outputs of each
            group of siblings that share an input, one after the other.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self.moments: dict[tuple[nn.Linear, ...], torch.Tensor] = {}
        self._parents = {linear: name.rpartition(".")[0] for name, linear in linears.items()}
        self._shared = SharedInputs()
        self._groups: dict[nn.Linear, list[nn.Linear]] = {}  # by the first that is called
        self._gradients: dict[nn.Linear, torch.Tensor] = {}  # of this call

    def listen(self, undo: ExitStack) -> None:
        """Register the hooks."""
        for linear in self._parents:
            undo.callback(linear.register_forward_hook(self._catch).remove)

    def add_up(self) -> None:
        """Take in what has come back, once the gradients of a call are complete."""
        for members in self._groups.values():
            caught = [self._gradients.get(linear) for linear in members]
            tokens = max(
                (len(of_linear) for of_linear in caught if of_linear is not None), default=0
            )
            if not tokens:  # an expert without a token in this call
                continue
            together = torch.cat(
                [
                    # an output that nothing depends on has no gradient
                    torch.zeros(tokens, len(linear.weight), device=linear.weight.device)
                    if of_linear is None
                    else of_linear.float()
                    for linear, of_linear in zip(members, caught, strict=True)
                ],
                dim=1,
            )
            together = normalize(together, eps=_NO_GRADIENT)
            size = together.shape[1]
            moments = self.moments.setdefault(tuple(members), together.new_zeros(size, size))
            moments.addmm_(together.T, together)
        self._gradients.clear()

    def _catch(self, linear: nn.Linear, args: tuple[Any, ...], output: torch.Tensor) -> None:
        is_new = not self._shared.knows(linear)
        leader = self._shared.leader_of(linear, self._parents[linear], args[0])
        if leader is None:
            return
        if is_new:
            self._groups.setdefault(leader, []).append(linear)
        if output.requires_grad:
            output.register_hook(lambda gradient: self._keep(linear, gradient.flatten(0, -2)))

    def _keep(self, linear: nn.Linear, gradient: torch.Tensor) -> None:
        self._gradients[linear] = gradient
