"""Find what a weight of the checkpoint was quantized from, however the source stores it.

Sources hold experts one by one, or all of a layer in one tensor, in one of several orders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from moeq_plugin.checkpoint.architecture import Linear
from moeq_plugin.checkpoint.checks.source.stacks import is_stack, matrices_in_stacks
from moeq_plugin.checkpoint.codes import can_read, read_rows, read_tensor
from moeq_plugin.checkpoint.formats import FLOATS
from moeq_plugin.checkpoint.headers import StoredTensor
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.core.names import canonical, of_expert

_TOWER = ("language_model.", "text_model.")


def plain_name(name: str) -> str:
    """Return a name as models without other towers have it.

    Example:
        >>> plain_name("model.language_model.layers.0.mlp.gate.weight")
        'model.layers.0.mlp.gate.weight'
    """
    for tower in _TOWER:
        name = name.replace(f"{tower}model.", "model.", 1).replace(tower, "", 1)
    return name


@dataclass(frozen=True)
class Originals:
    """The weights of a source, found by the names of a checkpoint.

    Args:
        source: the 16-bit model.
        experts: for (layer, expert) of the checkpoint the source's, where pruning renumbered.

    Attributes:
        source: as given.
        experts: as given.
        modules: its tensors by plain name of their module and by suffix.
    """

    source: Layout
    experts: Mapping[tuple[int | None, int], int] = field(default_factory=dict)
    modules: dict[str, dict[str, StoredTensor]] = field(init=False)

    def __post_init__(self) -> None:
        """Sort the source's tensors by plain names."""
        named = {plain_name(name): tensors for name, tensors in self.source.modules.items()}
        object.__setattr__(self, "modules", named)

    def candidates(self, linear: Linear, expert: int | None = None) -> Iterator[torch.Tensor]:
        """Yield what a linear may be in the source, in float32; several where shapes leave it open.

        Args:
            linear: of the checkpoint.
            expert: another expert's, by the source's number.
        """
        if expert is None and linear.expert is not None:
            expert = self.experts.get((linear.layer, linear.expert), linear.expert)
        name = plain_name(linear.name)
        if expert is not None and expert != linear.expert:
            name = name.replace(f".experts.{linear.expert}.", f".experts.{expert}.")
        if name == "lm_head" and name not in self.modules:  # tied
            name = "model.embed_tokens"
        plain = self.modules.get(name, {}).get("weight")
        if plain is not None:
            if can_read(plain) and plain.shape == linear.shape and plain.dtype in FLOATS:
                yield read_tensor(plain).float()
        elif expert is not None:
            yield from self._of_stack(name, linear.shape, expert)

    def bias(self, name: str) -> torch.Tensor | None:
        """Return an expert's bias out of the tensor that holds those of its layer."""
        found = of_expert(plain_name(name))
        if found is None or not found.projection.endswith(".bias"):
            return None
        projection = found.projection.removesuffix(".bias")
        stack = "down_proj" if projection == "down_proj" else "gate_up_proj"
        stored = self.modules.get(f"{found.block}.experts.{stack}_bias", {}).get("")
        if stored is None or not can_read(stored) or found.expert >= stored.shape[0]:
            return None
        bias = read_rows(stored, found.expert, 1)[0]
        if projection == "down_proj":
            return bias
        is_up = projection == "up_proj"
        return (
            bias[is_up::2] if self.source.architecture.family == "gpt_oss" else bias.chunk(2)[is_up]
        )

    def is_stacked(self, name: str) -> bool:
        """Tell whether a tensor of the source holds all experts of a layer."""
        module = canonical(plain_name(name)).removesuffix(".weight").removesuffix("_bias")
        return is_stack(module)

    def _of_stack(self, name: str, shape: tuple[int, int], expert: int) -> Iterator[torch.Tensor]:
        found = of_expert(name)
        if found is not None:
            found = replace(found, expert=expert)
            family = self.source.architecture.family
            yield from matrices_in_stacks(self.modules, found, shape, family)
