"""Run one layer of a model forward and backward again, as in a pass through the whole model.

The gradients of all linears of a large model are more than fits. What fits is what each layer was
called with and the gradient that came back to what it returned: two vectors per token and layer.
From these one layer after the other can be run again, and all its gradients be had.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from moeq_plugin.models.gradients import (
    drawn_for,
    drawn_surprise,
    freeze,
    start_gradients,
)


@dataclass
class _Call:
    """One call of a layer.

    Attributes:
        arguments: positional and named ones; what gradients flow through is detached.
        gradients: of every tensor that the layer returned and gradients flow through.
    """

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)


class LayerReplay:
    """Layers, and what has to be known to run each of them again.

    Args:
        layers: the layers by name.

    Attributes:
        num_tokens: how many tokens were seen.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.num_tokens = 0
        self._layers = dict(layers)
        self._calls: dict[nn.Module, list[_Call]] = {layer: [] for layer in layers.values()}

    def record(
        self,
        model: nn.Module,
        batches: Iterable[Mapping[str, torch.Tensor]],
        *,
        max_tokens: int,
        tokens_before: int = 0,
        seed: int = 0,
    ) -> None:
        """Run forward and backward, of the likelihood of tokens that the model itself draws.

        Args:
            model: a causal language model.
            batches: ``input_ids`` and maybe ``attention_mask``, ``[batch, sequence]``.
            max_tokens: the batch that reaches this many is the last.
            tokens_before: how many of them other processes see in batches before these.
            seed: of the tokens that are drawn; a sequence draws the same in any batch.

        Raises:
            ValueError: if no gradient comes back to a layer that was called.
        """
        device = next(model.parameters()).device
        with ExitStack() as undo, torch.enable_grad():
            freeze(model, undo)
            hooks = [start_gradients(model)]
            for layer in self._layers.values():
                hooks.append(layer.register_forward_pre_hook(self._note_call, with_kwargs=True))
                hooks.append(layer.register_forward_hook(self._note_gradients))
            for hook in hooks:
                undo.callback(hook.remove)
            start = tokens_before + self.num_tokens
            for ids, mask, chances in drawn_for(batches, device, start, max_tokens, seed):
                loss = drawn_surprise(model, ids, mask, next(chances))
                if loss.requires_grad:
                    loss.backward()
                self.num_tokens += int(mask.sum())
        self._check_gradients()

    def replay(self, layer: nn.Module, after_call: Callable[[], None]) -> None:
        """Run a layer forward and backward on all that it was called with, then forget it.

        Args:
            layer: its weights have to be what they were.
            after_call: called when gradients of one call have come back.
        """
        with ExitStack() as undo, torch.enable_grad():
            freeze(layer, undo)
            device = next(layer.parameters()).device
            for call in self._calls.pop(layer):
                args, kwargs = tree_map(lambda value: _flowing_again(value, device), call.arguments)
                outputs = [leaf for leaf in tree_leaves(layer(*args, **kwargs)) if _flows(leaf)]
                reached = {
                    outputs[index]: gradient.to(device)
                    for index, gradient in call.gradients.items()
                }
                torch.autograd.backward(list(reached), list(reached.values()))
                after_call()

    def _note_call(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls[layer].append(_Call(tree_map(_kept, (args, kwargs))))

    def _note_gradients(self, layer: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Return what a layer has returned, with hooks on it."""
        gradients, indices = self._calls[layer][-1].gradients, itertools.count()

        def listened(value: Any) -> Any:
            if not _flows(value):
                return value
            index = next(indices)
            # a view: what comes back to the tensor itself may come from inside of the layer too, as
            # to the values that RWKV-7's first layer both uses and hands on
            view = value.view_as(value)
            view.register_hook(lambda gradient: gradients.update({index: gradient.cpu()}))
            return view

        return tree_map(listened, output)

    def _check_gradients(self) -> None:
        """Refuse a model that gradients do not come back through.

        Raises:
            ValueError: naming the first layer that none came back to.
        """
        cut = [
            name
            for name, layer in self._layers.items()
            if any(not call.gradients for call in self._calls[layer])
        ]
        if cut:
            raise ValueError(
                f"no gradient comes back to the outputs of {cut[0]} ({len(cut)} of "
                f"{len(self._layers)} layers): the model cannot be differentiated as it is, as "
                "with weights that are quantized already. Leave row_feedback off."
            )


@dataclass(frozen=True)
class _Flowing:
    """Stands for a tensor that gradients flow through."""

    tensor: torch.Tensor


def _kept(value: Any) -> Any:
    """Return what is kept of an argument: what differs from layer to layer, off the accelerator."""
    return _Flowing(value.detach().cpu()) if _flows(value) else value


def _flowing_again(value: Any, device: torch.device) -> Any:
    return value.tensor.to(device).requires_grad_() if isinstance(value, _Flowing) else value


def _flows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
