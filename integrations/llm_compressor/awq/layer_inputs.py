"""What AWQ's search for scales needs to know of the inputs of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from llmcompressor.modifiers.transform.awq.mappings import ResolvedMapping
from torch import nn

from moeq_plugin.integrations.llm_compressor.awq.mappings import judged_alone
from moeq_plugin.records.run import Basis


@dataclass(frozen=True)
class Moments:
    """Second moments of a linear's inputs, guarded, and what they rest on.

    Attributes:
        hessian: ``[in, in]``.
        weight_sum: what to divide a loss by for a mean over tokens.
        basis: whose tokens they are of.
        effective_tokens: of the linear's own tokens.
    """

    hessian: torch.Tensor
    weight_sum: float
    basis: Basis
    effective_tokens: float


@dataclass(frozen=True)
class Magnitude:
    """Running mean of what an input's features measure, the direction that scales are tried along.

    Attributes:
        total: ``[in]`` float32, sum of absolute values.
        count: ``[]`` tokens.
    """

    total: torch.Tensor
    count: torch.Tensor


@dataclass(frozen=True)
class LayerInputs:
    """What the inputs of one layer are like, as far as batches have called it.

    Attributes:
        moments: of each observed linear.
        magnitudes: of the input of each mapping, by the name of the module that is scaled.
    """

    moments: Mapping[nn.Linear, Moments]
    magnitudes: Mapping[str, Magnitude]

    def has_tokens(self, mapping: ResolvedMapping) -> bool:
        """Tell whether there is something to judge a mapping of this layer by."""
        linear = judged_alone(mapping)
        if linear is not None:
            return self.moments[linear].basis is not Basis.NONE
        return bool(self.magnitudes[mapping.smooth_name].count > 0)

    def magnitude(self, mapping: ResolvedMapping) -> Magnitude:
        """Return what scales of a mapping of this layer are tried along.

        Where second moments are borrowed, nobody has summed up absolute values of the same tokens:
        their root mean square stands in.
        """
        linear = judged_alone(mapping)
        moments = self.moments[linear] if linear is not None else None
        if moments is None or moments.basis in {Basis.OWN, Basis.FEW}:
            return self.magnitudes[mapping.smooth_name]
        squares = moments.hessian.diagonal() / (2 * moments.weight_sum)
        return Magnitude(squares.sqrt(), torch.ones(()))
