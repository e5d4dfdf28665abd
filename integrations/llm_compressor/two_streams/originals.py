"""The 16-bit weights of a layer while it is being rounded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from moeq_plugin.integrations.llm_compressor.schemes import weight_of


class Originals:
    """Copies of weights, taken before any of them is rounded.

    Args:
        modules: what will be rounded, onloaded for as long as this lives.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._weights = {module: weight_of(module).detach().clone() for module in modules}

    @contextlib.contextmanager
    def at_work(self, part: nn.Module | None = None) -> Iterator[None]:
        """Let modules compute with their 16-bit weights while it is entered.

        Args:
            part: that holds them, ``None`` for all.
        """
        rounded: dict[nn.Module, torch.Tensor] = {}
        modules = self._weights if part is None else part.modules()
        for module, weight in ((m, self._weights[m]) for m in modules if m in self._weights):
            # another tensor in the same parameter: what ranks share is not written to
            parameter = weight_of(module)
            rounded[module], parameter.data = parameter.data, weight
        try:
            yield
        finally:
            for module, weight in rounded.items():
                weight_of(module).data = weight
