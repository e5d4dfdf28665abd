"""llama.cpp's types as the options of an allocation.

llama.cpp holds all experts of a projection in one tensor of one type, so that the target of such
an allocation is ``gguf``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from moeq_plugin.integrations.llama_cpp.ggml import block_of
from moeq_plugin.integrations.llm_compressor.allocation.options import Option

DEFAULT_TYPES = (
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K"),
    *("IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
)
# what llama-quantize itself gives token embeddings that are the output as well, where it fits
_EMBEDDING, _NARROW_EMBEDDING = "Q6_K", "Q8_0"
EMBEDDINGS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class TensorType(Option):
    """One of llama.cpp's types for the weights of a linear; it is no scheme of the host."""

    @property
    def is_exact(self) -> bool:
        """Tell that weights are rounded, by llama.cpp and not by a scheme of the host."""
        return False

    def fits(self, linear: nn.Linear) -> bool:
        """Tell whether the type's blocks divide the linear's input columns."""
        return linear.weight.shape[1] % block_of(self.name)[0] == 0

    def num_bytes(self, linear: nn.Linear) -> int:
        """Return the bytes that llama.cpp stores for the weight; see :meth:`Option.num_bytes`."""
        if not self.fits(linear):
            return int(linear.weight.nbytes)
        columns, num_bytes = block_of(self.name)
        return linear.weight.numel() // columns * num_bytes

    def describe(self) -> str:
        """Return the type's name."""
        return self.name


def parse_types(names: Iterable[str]) -> tuple[TensorType, ...]:
    """Return the options with these names.

    Raises:
        ValueError: for unknown, repeated or too few names, and for types that are no integers.
    """
    names = tuple(names)
    if len(names) < 2 or len(set(names)) != len(names):
        raise ValueError(f"options must be at least two different types, got {list(names)}")
    for name in names:
        if block_of(name)[0] == 1:
            raise ValueError(f"{name} is a type without blocks, to which nothing is rounded")
    return tuple(TensorType(name, None) for name in names)


def embedding_type(columns: int) -> str:
    """Return the type for embeddings and output of this width."""
    return _EMBEDDING if columns % block_of(_EMBEDDING)[0] == 0 else _NARROW_EMBEDDING


def other_bytes(model: PreTrainedModel, names: Mapping[nn.Linear, str]) -> int:
    """Return the bytes of all tensors but these linears' weights: float32 but for embeddings."""
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    total = 0
    for weight in embeddings:
        columns, num_bytes = block_of(embedding_type(weight.shape[1]))
        total += weight.numel() // columns * num_bytes
    others = set(model.parameters()) - embeddings - {linear.weight for linear in names}
    return total + sum(4 * parameter.numel() for parameter in others)
