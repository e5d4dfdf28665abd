"""How sensitivities are measured."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SensitivityConfig:
    """How to measure sensitivities.

    Attributes:
        gradient: take ``g`` from a backward pass through the whole model. Without, losses are
            squared errors of what a block adds to the residual stream; for models that do not
            fit.
        gradient_tokens: calibration tokens that the backward pass sees.
        gradient_limit: shorten the gradients of single tokens to this many times the median of
            their sequence (:func:`moeq_plugin.models.gradients.limited`), for models with a
            recurrent state; ``None`` takes them as they are.
        router_weight: what a nat of KL divergence of a router's choice counts, in nats of the
            prediction.
        domain_names: names of the values 0, 1, ... of the data set's column ``domain``.
        undercovered_tokens: an expert with fewer effective tokens is undercovered.
        interactions: measure whether errors of a layer's experts add up; keeps the layer's
            weights at every option at once.
    """

    gradient: bool = True
    gradient_tokens: int = 16384
    gradient_limit: float | None = None
    router_weight: float = 0.0
    domain_names: tuple[str, ...] | None = None
    undercovered_tokens: float = 16.0
    interactions: bool = False

    def __post_init__(self) -> None:
        if self.gradient_tokens < 1:
            raise ValueError(f"gradient_tokens must be at least 1, got {self.gradient_tokens}")
        if self.gradient_limit is not None and not self.gradient_limit >= 1:
            raise ValueError(f"gradient_limit must be at least 1, got {self.gradient_limit}")
        if not 0 <= self.router_weight < math.inf:
            raise ValueError(f"router_weight must be finite and >= 0, got {self.router_weight}")
