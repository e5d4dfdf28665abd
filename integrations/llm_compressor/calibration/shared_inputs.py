"""Which linears receive the very same tensor, so that its second moments are measured once."""

from __future__ import annotations

import weakref
from collections.abc import Hashable

import torch
from torch import nn


class SharedInputs:
    """Finds siblings with one input: gate and up of an expert; q, k and v."""

    def __init__(self) -> None:
        # the tensor that came last to each group of siblings, and who received it first; held
        # weakly, or the activations of a whole layer would stay alive
        self._recent: dict[Hashable, tuple[weakref.ref[torch.Tensor], nn.Linear]] = {}
        self._leaders: dict[nn.Linear, nn.Linear] = {}

    def knows(self, linear: nn.Linear) -> bool:
        """Tell whether a linear has been called before."""
        return linear in self._leaders

    def leader_of(
        self, linear: nn.Linear, group: Hashable, inputs: torch.Tensor
    ) -> nn.Linear | None:
        """Return the sibling that has already received this very tensor, or the linear itself.

        ``None`` for zeros that stand for what came before the first token (Zaya): they add nothing
        to second moments, and whoever gets them goes on sharing its other inputs.

        Args:
            linear: which is being called.
            group: of those that may share second moments with it.
            inputs: what it is called with.

        Raises:
            RuntimeError: if two linears share their input in some batches only.
        """
        recent = self._recent.get(group)
        # the object itself: a tensor that is gone may have left its address to another
        is_shared = recent is not None and recent[0]() is inputs
        leader = recent[1] if recent is not None and is_shared else linear
        if self._leaders.get(linear, leader) is not leader and not inputs.any():
            return None
        if not is_shared:
            self._recent[group] = (weakref.ref(inputs), linear)
        if self._leaders.setdefault(linear, leader) is not leader:
            raise RuntimeError(
                f"{linear} shared its input with a sibling in one batch and not in another: its "
                "Hessian would be incomplete. Please report this architecture."
            )
        return leader

    def clear(self) -> None:
        """Forget a layer that has been compressed."""
        self._recent.clear()
        self._leaders.clear()
