"""What an error in an element-wise weight costs: the second moment of what it is multiplied with.

The output of ``x * weight`` changes by ``x * (weight - quantized)``. Its squared change, summed
over tokens, is ``sum_j s_j (weight_j - quantized_j)^2`` with ``s_j = sum_t x_tj^2``: a diagonal
Hessian (RWKVQuant, arXiv:2505.03803, codebook optimization for element-wise multiplication).

To keep a few extreme tokens from deciding alone, the paper clips activations to a percentile
before it pools them. It averages first and squares then; here squares are averaged, as the error
has it, since inputs such as RWKV's token shift have mean zero. Clipping is by sequence and channel,
so that how sequences are split into batches changes nothing, and channels keep their scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class ChannelPower:
    """A running second moment of every channel.

    Attributes:
        square_sum: ``[channels]`` float64, ``sum_t x_t^2`` after clipping.
        num_tokens: how many tokens went in.
    """

    square_sum: torch.Tensor
    num_tokens: int = 0

    @classmethod
    def zeros(cls, channels: int, device: torch.device | str = "cpu") -> ChannelPower:
        """Return the power of ``channels`` channels that have seen no token."""
        return cls(torch.zeros(channels, dtype=torch.float64, device=device))

    def add(self, inputs: torch.Tensor, percentile: float = 100.0) -> None:
        """Add one sequence, in place.

        Args:
            inputs: ``[tokens, channels]`` of one sequence, any float dtype.
            percentile: larger magnitudes count as that of this percentile of the sequence's
                tokens, channel by channel; above 0, 100 clips nothing.

        Raises:
            ValueError: if shape or percentile do not fit.
        """
        if inputs.shape[1:] != self.square_sum.shape:
            raise ValueError(
                f"inputs must be [tokens, {len(self.square_sum)}], got {list(inputs.shape)}"
            )
        if not 0 < percentile <= 100:
            raise ValueError(f"percentile must be above 0 and at most 100, got {percentile}")
        if not len(inputs):
            return
        magnitude = inputs.double().abs()
        rank = math.ceil(len(inputs) * percentile / 100)  # the smallest value that covers it
        if rank < len(inputs):
            magnitude = magnitude.clamp(max=magnitude.kthvalue(rank, dim=0).values)
        self.square_sum += magnitude.square().sum(0)
        self.num_tokens += len(inputs)

    def mean(self) -> torch.Tensor:
        """Return ``[channels]`` float64 mean squares; ones without tokens."""
        if not self.num_tokens:
            return torch.ones_like(self.square_sum)
        return self.square_sum / self.num_tokens
