"""What a decoder layer is called with, kept so that it can be run again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import nn


class _ReachedError(Exception):
    """A layer has run as far as it had to."""


class LayerCalls:
    """The arguments of a layer, batch by batch.

    Args:
        layer: takes hidden states first, or by the name ``hidden_states``.
        offload_device: where arguments are kept.

    Attributes:
        layer: the layer.
    """

    def __init__(self, layer: nn.Module, offload_device: torch.device) -> None:
        self.layer = layer
        self._offload_device = offload_device
        self.forget()

    def __len__(self) -> int:
        return len(self._cache)

    def note(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of a call; a forward pre-hook."""
        self._cache.append({"args": args, "kwargs": kwargs})

    def forget(self) -> None:
        """Let go of all arguments: the hook that notes them lives on."""
        self._cache = IntermediatesCache(None, self._offload_device)

    def hidden(self, index: int) -> torch.Tensor:
        """Return the hidden states that a batch came with."""
        call = self._cache.fetch(index)
        states: torch.Tensor = call["args"][0] if call["args"] else call["kwargs"]["hidden_states"]
        return states

    def run(
        self, index: int, hidden: torch.Tensor | None = None, until: nn.Module | None = None
    ) -> torch.Tensor | None:
        """Run the layer as it was called.

        Args:
            index: of the batch.
            hidden: hidden states in the place of those that it came with.
            until: module that is not run any more, nor is what comes after it.

        Returns:
            What the layer puts out, ``None`` if it did not run to its end.
        """
        call = self._cache.fetch(index)
        args, kwargs = call["args"], call["kwargs"]
        if hidden is not None and args:
            args = (hidden, *args[1:])
        elif hidden is not None:
            kwargs = {**kwargs, "hidden_states": hidden}
        with stopping(until):
            output = self.layer(*args, **kwargs)
            states: torch.Tensor = output[0] if isinstance(output, tuple) else output
            return states
        return None


@contextlib.contextmanager
def stopping(module: nn.Module | None) -> Iterator[None]:
    """Leave the block where a module would be run, ``None`` for nowhere."""
    if module is None:
        yield
        return

    def stop(_module: nn.Module, _args: object) -> None:
        raise _ReachedError

    handle = module.register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(_ReachedError):
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def inputs_of(modules: list[nn.Module], noted: dict[nn.Module, torch.Tensor]) -> Iterator[None]:
    """Note the input of each of some modules, as ``[tokens, features]``, while it is entered."""

    def hook(module: nn.Module) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            noted[module] = args[0].flatten(0, -2)

        return note

    handles = [module.register_forward_pre_hook(hook(module)) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
