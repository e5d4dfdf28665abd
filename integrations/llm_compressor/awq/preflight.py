"""What AWQ cannot do, known before anything has been calibrated."""

from __future__ import annotations

from collections.abc import Mapping

from llmcompressor.core import State
from llmcompressor.modifiers.transform.awq.mappings import ResolvedMapping
from torch import nn

from moeq_plugin.integrations.llm_compressor import preflight
from moeq_plugin.integrations.llm_compressor.awq.mappings import judged_alone
from moeq_plugin.integrations.llm_compressor.calibration import ranks
from moeq_plugin.integrations.llm_compressor.host import running_oneshot
from moeq_plugin.integrations.llm_compressor.schemes import weight_args
from moeq_plugin.models.moe import MoELayer, UnsupportedModelError


def check_request(modifier: str, state: State, layers: list[MoELayer]) -> None:
    """Refuse models, data and recipes that scales cannot be chosen for.

    Args:
        modifier: name of the modifier that asks.
        state: the host's, with model and data.
        layers: the model's MoE layers.

    Raises:
        ValueError: saying what to do instead.
        UnsupportedModelError: for a dense model.
    """
    if not layers:
        raise UnsupportedModelError(
            f"{modifier} found no MoE layers, so there is no router to weight by; use "
            "llm-compressor's AWQModifier for a dense model"
        )
    if state.data.calib is None or len(state.data.calib) == 0:
        raise ValueError(
            f"{modifier} needs calibration data, got none: pass dataset=... to oneshot, or let "
            "the model write some with moeq_plugin.ebss_dataset"
        )
    preflight.check_merged(state.model)
    preflight.check_untouched(state.model)
    preflight.check_saving(state.model, layers)
    preflight.count_tokens(state.data.calib, state.model).warn()
    preflight.check_finite_weights(state.model)
    running = running_oneshot()
    if running is not None and running.dataset_args.use_loss_mask:
        raise ValueError(
            f"{modifier} cannot align use_loss_mask=True with the tokens that experts receive; "
            "leave it out. Padding counts nowhere anyway, where an attention_mask tells of it."
        )
    if any(weight_args(module) is not None for module in state.model.modules()):
        raise ValueError(
            f"{modifier} chooses scales for weights that are quantized after it, and this model "
            "has quantization schemes already: put it before the modifier that quantizes"
        )
    ranks.check_data_differ(state.data.calib)


def check_mappings(
    mappings: list[ResolvedMapping], layers: list[MoELayer], names: Mapping[nn.Module, str]
) -> None:
    """Refuse mappings that there is nothing to judge by, or that would be judged wrongly.

    Args:
        mappings: the resolved mappings, schemes attached.
        layers: the model's MoE layers.
        names: of all modules.

    Raises:
        ValueError: saying what to do instead.
    """
    if not mappings:
        raise ValueError(
            "the recipe quantizes nothing that scales could be moved into: MoEQuantAWQModifier "
            "only moves scales. Put QuantizationModifier(scheme=...) or "
            "MoEQuantModifier(scheme=...) after it; a scheme that is allocated during calibration "
            "comes too late for it."
        )
    balanced = [module for mapping in mappings for module in mapping.balance_layers]
    preflight.check_not_quantized({module: names[module] for module in balanced})
    of_experts = {module for layer in layers for module in layer.experts.modules()}
    for mapping in mappings:
        if mapping.parent in of_experts and judged_alone(mapping) is None:
            raise ValueError(
                f"the mapping {mapping.smooth_name} -> {', '.join(mapping.balance_names)} would be "
                f"judged by the output of {mapping.parent_name}, where tokens count alike that "
                "the router weights differently. Map to one linear of an expert, or to all that "
                "reads the input of the MoE block."
            )
