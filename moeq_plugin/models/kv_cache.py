"""Feed the branches of a search to a causal language model without moving its cache around.

An ordinary beam search appends to the cache by copying it and reorders it by copying it again, at
every step. Neither is needed: here keys and values lie in one buffer of the final size, and since
the search lets a branch stay in its place, only branches that were replaced are copied, from the
first token on in which old and new differ; on real models that is a few tokens per step. Layers
of another kind (sliding windows, recurrent states) are reordered by their own method.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moeq_plugin.core.beam_search import Extension


class Branches:
    """A model with the cache of all branches of a batch of sequences.

    Args:
        model: a causal language model of transformers.
        capacity: tokens that a branch can grow to.
    """

    def __init__(self, model: nn.Module, capacity: int) -> None:
        self._model, self._capacity = model, capacity
        self._cache: Any = None
        self._growing: list[_InPlaceGrowth | None] = []
        self._branches = 1

    def start(self, prompts: torch.Tensor) -> torch.Tensor:
        """Feed ``[sequences, prompt]`` ids; return logits ``[sequences, 1, vocabulary]``."""
        return self._feed(prompts, 1)

    def extend(self, extension: Extension) -> torch.Tensor:
        """Feed a token to each branch; return logits ``[sequences, branches, vocabulary]``."""
        sequences, branches = extension.tokens.shape
        first = torch.arange(sequences, device=extension.parents.device)[:, None] * self._branches
        parents = (first + extension.parents).flatten()
        is_new_size = branches != self._branches or not self._growing
        self._branches = branches
        if is_new_size:
            self._cache.reorder_cache(parents)
            self._growing = [
                _InPlaceGrowth(layer, self._capacity)
                if _holds_every_token(layer, extension.length)
                else None
                for layer in self._cache.layers
            ]
        else:
            self._replace(parents, extension)
        return self._feed(extension.tokens.reshape(-1, 1), branches)

    def _replace(self, parents: torch.Tensor, extension: Extension) -> None:
        """Give the rows whose branch was replaced what their new branch has seen."""
        rows, from_rows, position = _moves(parents, extension)
        if not len(rows):
            return
        for layer, growth in zip(self._cache.layers, self._growing, strict=True):
            if growth is None:
                layer.reorder_cache(parents)
            else:
                growth.move(rows, from_rows, position)

    def _feed(self, rows: torch.Tensor, branches: int) -> torch.Tensor:
        output = self._model(input_ids=rows, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        last: torch.Tensor = output.logits[:, -1]
        return last.view(-1, branches, last.shape[1])


class _InPlaceGrowth:
    """Makes a cache layer write into buffers of the final size instead of growing by copies.

    Takes the place of the layer's ``update``; its keys and values become views of the buffers.
    """

    def __init__(self, layer: Any, capacity: int) -> None:
        self._layer = layer
        self._buffers = []
        for states in (layer.keys, layer.values):
            rows, heads, length, size = states.shape
            buffer = states.new_empty(rows, heads, capacity, size)
            buffer[:, :, :length] = states
            self._buffers.append(buffer)
        self._show(layer.keys.shape[2])
        layer.update = self._append

    def _append(
        self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[rows, heads, tokens, head]`` and return all keys and values."""
        length = self._layer.keys.shape[2]
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, length : length + states.shape[2]] = states
        self._show(length + keys.shape[2])
        return self._layer.keys, self._layer.values

    def move(self, rows: torch.Tensor, from_rows: torch.Tensor, position: torch.Tensor) -> None:
        """Copy single tokens of rows that stay to rows that are replaced."""
        for buffer in self._buffers:
            device = buffer.device
            target, source, at = rows.to(device), from_rows.to(device), position.to(device)
            buffer[target, :, at] = buffer[source, :, at]

    def _show(self, length: int) -> None:
        self._layer.keys, self._layer.values = (b[:, :, :length] for b in self._buffers)


def _moves(
    parents: torch.Tensor, extension: Extension
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return target row, source row and position of each cached token that must be copied."""
    shared = extension.shared_tokens.flatten()
    count = extension.length - shared
    rows = torch.arange(len(parents), device=parents.device).repeat_interleave(count)
    before = count.cumsum(0) - count
    position = torch.arange(len(rows), device=rows.device) - before[rows] + shared[rows]
    return rows, parents[rows], position


def _holds_every_token(layer: Any, length: int) -> bool:
    """Return whether a cache layer is one tensor of keys and one of values of all tokens."""
    tensors = {name for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    return (
        tensors == {"keys", "values"}
        and not getattr(layer, "is_sliding", True)
        and layer.keys.ndim == layer.values.ndim == 4
        and layer.keys.shape[2] == layer.values.shape[2] == length
    )
