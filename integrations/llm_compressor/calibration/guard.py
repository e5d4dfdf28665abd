"""Second moments that no expert starves on: too few tokens of its own borrow from the layer.

A prior of white noise (``SolverOptions.prior_tokens``) weighs much against few tokens, and against
ten for each input feature, or more, nothing at all.
"""

from __future__ import annotations

import torch
from llmcompressor.modifiers.utils.hooks import HooksMixin
from torch import nn

from moeq_plugin.core.hessian import (
    SecondMoments,
    own_share,
    shrink_toward,
    with_white_noise,
)
from moeq_plugin.core.solver_options import SolverOptions
from moeq_plugin.integrations.llm_compressor.calibration.observations import (
    Calibration,
    Observation,
)
from moeq_plugin.integrations.llm_compressor.calibration.token_sample import TokenSample
from moeq_plugin.integrations.llm_compressor.schemes import unquantized
from moeq_plugin.records.run import Basis

_PLAIN = SolverOptions()
_ENOUGH = 10  # tokens for each input feature: second moments of more are taken as they are


def guard(
    observation: Observation,
    calibration: Calibration,
    *,
    min_effective_tokens: float | None,
    shrinkage: float,
    solver: SolverOptions = _PLAIN,
) -> tuple[torch.Tensor, float, Basis]:
    """Return a Hessian that does not starve the expert, its sum of weights and what it rests on.

    Args:
        observation: what the expert's own tokens gave.
        calibration: holds the sample of the layer's tokens.
        min_effective_tokens: threshold; ``None`` means the number of input features, below which
            the second moments cannot have full rank.
        shrinkage: see :func:`moeq_plugin.core.hessian.shrink_toward`.
        solver: names the prior, and the damping that is to come, which is white noise too.
    """
    moments, position = observation.moments, observation.position
    threshold = len(moments.hessian) if min_effective_tokens is None else min_effective_tokens
    effective = moments.effective_tokens
    is_fed = effective >= threshold or (effective > 0 and shrinkage == 0)
    if position is None or position.expert is None or is_fed:
        own = Basis.OWN if is_fed else Basis.FEW
        basis = own if effective > 0 else Basis.NONE
        hessian = _with_prior(moments.hessian, solver, effective)
        return hessian, moments.weight_sum.item(), basis
    sample = calibration.samples[position.layer.experts]
    of_layer = layer_moments(observation, position.layer.expert(position.expert), sample)
    mixed = shrink_toward(moments, of_layer, min_effective_tokens=threshold, shrinkage=shrinkage)
    # a mixture is made of means: the sum of its weights is 1
    if of_layer.effective_tokens == 0:
        return mixed, 1.0, Basis.NONE
    share = own_share(moments, min_effective_tokens=threshold, shrinkage=shrinkage)
    tokens = effective / share if share > 0 else of_layer.effective_tokens
    hessian = _with_prior(mixed, solver, tokens)
    return hessian, 1.0, Basis.SHRUNK if effective > 0 else Basis.LAYER


def _with_prior(hessian: torch.Tensor, solver: SolverOptions, tokens: float) -> torch.Tensor:
    """Return second moments with what the prior asks for beyond the damping that is to come."""
    missing = len(hessian) / tokens - 1 / _ENOUGH if tokens else 0.0
    noise = solver.prior_tokens * missing - solver.dampening_frac
    return with_white_noise(hessian, max(0.0, noise))


@torch.no_grad()
def layer_moments(
    observation: Observation, expert: nn.Module, sample: TokenSample
) -> SecondMoments:
    """Return the second moments that the layer's tokens would give this expert's linear.

    For gate and up these are the sample's own; for down the sample is sent through the expert.
    """
    linear = observation.linears[0]  # all of them receive one input, so that any will do
    if linear is not expert.down_proj:
        return sample.moments
    inputs: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    try:
        # these tokens are borrowed: nobody else observes them, and no scale may be at work yet
        with HooksMixin.disable_hooks(), unquantized(expert):
            expert(sample.rows)
    finally:
        handle.remove()
    moments = SecondMoments.zeros(inputs[0].shape[-1], inputs[0].device)
    moments.add(inputs[0])
    return moments
