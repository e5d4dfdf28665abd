"""How much each output of each linear matters, from backward passes over the calibration data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import torch
from compressed_tensors.distributed import is_distributed
from torch import distributed, nn

from moeq_plugin.integrations.llm_compressor.allocation.sensitivity_config import SensitivityConfig
from moeq_plugin.integrations.llm_compressor.calibration import ranks
from moeq_plugin.models.gradients import OutputGradients, num_tokens
from moeq_plugin.models.moe import MoELayer


def measure_row_weights(
    model: nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    names: Mapping[nn.Linear, str],
    layers: Collection[MoELayer],
    *,
    config: SensitivityConfig,
    seed: int,
) -> dict[nn.Linear, torch.Tensor]:
    """Return ``[out]`` float64 mean squared gradients of each linear's outputs, on every rank.

    With several ranks each runs the backward passes of its own batches.

    Args:
        model: whose experts run on routed tokens only.
        batches: this rank's calibration data.
        names: the linears and their names.
        layers: the model's MoE layers.
        config: how many tokens, and what a router's choice counts.
        seed: of the tokens that the model draws.
    """
    seen = sum(num_tokens(batch) for batch in batches)
    # the limit on tokens is that of all ranks: one has to know what those before it have used
    before, _ = ranks.over_ranks(Counter({0: seen}))
    gradients = OutputGradients(names, layers, config.gradient_limit)
    gradients.measure(
        model,
        batches,
        max_tokens=config.gradient_tokens,
        tokens_before=before[0],
        router_weight=config.router_weight,
        seed=seed,
    )
    if is_distributed():
        gradients.sum_over_processes(distributed.all_reduce)
    return gradients.row_weights()
