"""llm-compressor's search for scales, made for one run: every use of what is private to its AWQ.

It is a stock ``AWQModifier`` that no recipe holds, so it may write its fields, as the host's does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import ResolvedMapping
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.sentinel import Sentinel
from pydantic import PrivateAttr
from torch import nn

from moeq_plugin.integrations.llm_compressor.awq.batches import BatchMasks, merged
from moeq_plugin.integrations.llm_compressor.awq.layer_inputs import LayerInputs
from moeq_plugin.integrations.llm_compressor.awq.mappings import FoundMappings, judged_alone
from moeq_plugin.integrations.llm_compressor.awq.preflight import check_mappings
from moeq_plugin.integrations.llm_compressor.awq.scale_losses import (
    BlockLoss,
    LinearLoss,
    Loss,
    Outputs,
)
from moeq_plugin.integrations.llm_compressor.host import summed_already, without_pinning
from moeq_plugin.models.moe import MoELayer


@dataclass(frozen=True)
class Structure:
    """What a model is made of, as far as scales are concerned; known before it has schemes.

    Attributes:
        layers: its MoE layers.
        names: of all modules.
        found: the mappings that were found; ``None`` where the recipe gives its own.
    """

    layers: list[MoELayer]
    names: dict[nn.Module, str]
    found: FoundMappings | None


@dataclass(frozen=True)
class Choice:
    """The scales that were chosen for one mapping.

    Attributes:
        mapping: what they were moved between.
        scales: ``[in]``, what the inputs are divided by.
        loss: with the scales.
        loss_unscaled: without any.
    """

    mapping: ResolvedMapping
    scales: torch.Tensor
    loss: float
    loss_unscaled: float


class Search(AWQModifier):
    """The host's AWQ on mappings, statistics and losses of ours.

    Args:
        recipe: what was asked for; its fields are read and left as they are.
        structure: of the model.
        masks: token masks of the batches.
    """

    _structure: Structure = PrivateAttr()
    _masks: BatchMasks = PrivateAttr()
    _left_out: dict[str, str] = PrivateAttr(default_factory=dict)
    _inputs: LayerInputs = PrivateAttr(default_factory=lambda: LayerInputs({}, {}))
    _merged: set[nn.Module] = PrivateAttr(default_factory=set)
    _loss: Loss = PrivateAttr()
    _choices: list[Choice] = PrivateAttr(default_factory=list)

    def __init__(self, recipe: AWQModifier, structure: Structure, masks: BatchMasks) -> None:
        device = recipe.offload_device
        # left to the host it is a Sentinel, which the host takes for a default but not as a value
        asked: dict[str, Any] = {} if isinstance(device, Sentinel) else {"offload_device": device}
        super().__init__(
            # found by structure: from None the host would go by the name of the architecture
            mappings=recipe.mappings or [],
            duo_scaling=recipe.duo_scaling,
            n_grid=recipe.n_grid,
            **asked,
        )
        self._structure = structure
        self._masks = masks
        self._loss = BlockLoss(super()._compute_loss, [])

    @property
    def resolved(self) -> list[ResolvedMapping]:
        """Return the mappings into weights that have a scheme, once calibration has started.

        The host keeps them private; upstream would have to offer them.
        """
        return self._resolved_mappings

    @property
    def left_out(self) -> dict[str, str]:
        """Return names of modules that nothing is moved out of, with the reason, likewise."""
        return self._left_out

    def smooth(
        self,
        state: State,
        event: Event,
        mappings: list[ResolvedMapping],
        inputs: LayerInputs,
    ) -> list[Choice]:
        """Choose scales for mappings of the layer that has just been calibrated, and move them.

        Args:
            state: the host's, with the model.
            event: the host's, at the end of the layer.
            mappings: which, in order of execution; each with tokens to judge it by.
            inputs: what the layer's inputs are like.

        Returns:
            What was chosen; a mapping whose block puts out NaN or infinity is left as it was.
        """
        self._inputs, self._choices = inputs, []
        self._merge_batches()
        self._hand_over(mappings)
        with without_pinning(), summed_already():
            self.on_sequential_epoch_end(state, event)
        self._inputs = LayerInputs({}, {})
        self._merged.clear()
        return self._choices

    def _merge_batches(self) -> None:
        """Let the layer's MoE block, which treats every token by itself, run on few batches.

        The host runs it on what it has cached; upstream would have to let one replace that.
        """
        for layer in self._structure.layers:
            cache = self._parent_args_cache.get(layer.block)
            if not cache:
                continue  # of another layer, or nothing smooths it
            batches = merged(cache, self._masks.of_batches())
            if batches is not None:
                self._parent_args_cache[layer.block] = batches
                self._merged.add(layer.block)

    def _hand_over(self, mappings: list[ResolvedMapping]) -> None:
        """Replace what the host's own hooks have summed up, which count padding, by ours.

        Upstream would have to take magnitudes as an argument of its search.
        """
        self._smooth_activation_stats.clear()
        for mapping in mappings:
            magnitude = self._inputs.magnitude(mapping)
            self._smooth_activation_stats[mapping.smooth_name] = [magnitude.total, magnitude.count]
            linear = judged_alone(mapping)
            if linear is not None:
                # the host wants an input to run and none is needed: the loss asks the moments
                cache = IntermediatesCache(None, None)
                cache.append({"input": torch.zeros_like(linear.weight[:1])})
                self._parent_args_cache[linear] = cache

    def _set_resolved_mappings(self, model: nn.Module) -> None:
        """Take the mappings that were given or found, as far as they are for quantized weights.

        The host resolves regular expressions only; upstream would have to accept resolved mappings.
        """
        found = self._structure.found
        if found is None:
            super()._set_resolved_mappings(model)
        else:
            quantized = found.only_quantized()
            self._resolved_mappings = list(quantized.resolved)
            self._left_out = dict(quantized.left_out)
        check_mappings(self._resolved_mappings, self._structure.layers, self._structure.names)

    def _setup_activation_cache_hooks(self) -> None:
        """Let the host keep the arguments of blocks; linears are judged by second moments.

        The host keeps those of every parent; upstream would have to let a loss say what it needs.
        """
        everything = self._resolved_mappings
        self._resolved_mappings = [m for m in everything if judged_alone(m) is None]
        super()._setup_activation_cache_hooks()
        self._resolved_mappings = everything

    def _compute_best_scale(
        self,
        mapping: ResolvedMapping,
        fp16_outputs: list[torch.Tensor],
        orig_layer_weights: dict[nn.Module, torch.Tensor],
    ) -> torch.Tensor:
        """Let the host search by the loss that is the mapping's, and note what it found.

        Its scales and losses end up in the log; upstream would have to return them.
        """
        self._loss = self._loss_of(mapping, orig_layer_weights)
        scales = super()._compute_best_scale(mapping, fp16_outputs, orig_layer_weights)
        found = self._error_metrics[-1]
        self._choices.append(Choice(mapping, scales, found["best_error"], found["initial_error"]))
        return scales

    def _loss_of(self, mapping: ResolvedMapping, original: dict[nn.Module, torch.Tensor]) -> Loss:
        linear = judged_alone(mapping)
        if linear is not None:
            return LinearLoss(linear, original[linear], self._inputs.moments[linear])
        masks = [] if mapping.parent in self._merged else self._masks.of_batches()
        return BlockLoss(super()._compute_loss, masks)

    def _compute_loss(self, fp16_outputs: Outputs, int_w_outputs: Outputs) -> float:
        """Return the loss of the mapping that is being searched for.

        The host knows one loss; upstream would have to take it as an argument.
        """
        return self._loss(fp16_outputs, int_w_outputs)
