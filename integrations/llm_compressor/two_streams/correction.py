"""Put corrected weights in the place of those that are about to be rounded."""

from __future__ import annotations

import torch
from compressed_tensors.offload import update_offload_parameter
from llmcompressor.modifiers.quantization.calibration import observe
from llmcompressor.observers import Observer

from moeq_plugin.core.corrected_target import PairedMoments, corrected
from moeq_plugin.core.hessian import own_share
from moeq_plugin.integrations.llm_compressor.calibration.observations import Observation
from moeq_plugin.integrations.llm_compressor.unfinished import mark_changed
from moeq_plugin.records.run import Basis


def correct(
    observation: Observation,
    hessian: torch.Tensor,
    basis: Basis,
    *,
    min_effective_tokens: float | None,
    shrinkage: float,
) -> None:
    """Correct the weights of an observation's linears, and let their observers see the new ones.

    What an expert borrows from its layer are tokens that need no correction: the fewer it has seen
    itself, the closer it stays to its 16-bit weights.

    Args:
        observation: with what the 16-bit stream has more.
        hessian: ``[in, in]``, guarded.
        basis: what it rests on.
        min_effective_tokens: as of :func:`guard`.
        shrinkage: likewise.
    """
    moments = observation.moments
    assert isinstance(moments, PairedMoments)
    threshold = len(hessian) if min_effective_tokens is None else min_effective_tokens
    if basis is Basis.OWN:
        share = 1.0
    elif basis is Basis.FEW:
        share = moments.effective_tokens / threshold
    elif basis is Basis.SHRUNK:
        # as it stands in the mixture
        own = own_share(moments, min_effective_tokens=threshold, shrinkage=shrinkage)
        share = own / moments.weight_sum.item()
    else:
        return
    for linear in observation.linears:
        mark_changed(linear)
        weight = corrected(linear.weight, hessian, moments, share)
        update_offload_parameter(linear, "weight", weight.to(linear.weight.dtype))
        observer = linear.weight_observer
        assert isinstance(observer, Observer)
        observer.delete_statistics(check_fused=False)  # else it would not look once more
        observe(linear, base_name="weight")
