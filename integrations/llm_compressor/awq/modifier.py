"""MoEQuantAWQModifier: AWQ whose scales for an expert are judged by the tokens that it serves."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.sentinel import Sentinel
from pydantic import (
    Field,
    PrivateAttr,
    ValidatorFunctionWrapHandler,
    field_serializer,
    field_validator,
)
from torch import nn

from moeq_plugin.integrations.llm_compressor import places
from moeq_plugin.integrations.llm_compressor.awq.preflight import check_request
from moeq_plugin.integrations.llm_compressor.awq.smoothing_record import Request
from moeq_plugin.integrations.llm_compressor.awq.smoothing_run import Run
from moeq_plugin.integrations.llm_compressor.frozen_fields import FrozenFields
from moeq_plugin.integrations.llm_compressor.host import forget_failure, undo_with_oneshot
from moeq_plugin.integrations.llm_compressor.one_run import OneRun
from moeq_plugin.models.linear_experts import linear_moe_layers
from moeq_plugin.records.run import RunRecord


class MoEQuantAWQModifier(FrozenFields, OneRun, AWQModifier):
    """Move scales between modules as AWQ does, judging those of an expert by its own tokens.

    For a linear inside an expert the scales ``s`` are those with the least
    ``sum_t c_te^p ||Q(W diag(s)) (x_t / s) - W x_t||^2`` over the tokens routed to it, ``c_te`` the
    router's combine weight and ``p`` the ``affinity_power`` (MoEQuant+, arXiv:2505.03804, Eq. 18;
    a shared expert is weighted by its gate). The norm before a MoE block feeds all its experts and
    the router; its scales are judged by the output of the whole block, in which ``c_te`` multiplies
    every expert already, so nothing is weighted there.

    Like the host's ``AWQModifier`` this only moves scales: put a modifier that quantizes after it.
    Arguments that are not listed are the host's.

    Where we differ from the host: mappings are read off the model's structure, include everything
    that reads a norm (the host leaves out routers and shared experts of some architectures, which
    changes the model), and are tried before they are used; experts run on the tokens routed to
    them; linears are judged by second moments instead of stored activations; padding counts
    nowhere; an expert that saw too little borrows from its layer.

    Sample yaml:

    ```yaml
    quant_stage:
      quant_modifiers:
        MoEQuantAWQModifier:
          clip: true
        QuantizationModifier:
          scheme: W4A16
          ignore: [lm_head, "re:.*gate$"]
    ```

    Lifecycle:

    - on_initialize: check the request, find mappings and try them
    - on_calibration_start: hooks, on schemes that later modifiers have attached by then
    - on_sequential_epoch_end: choose scales of one layer, apply them, clip
    - on_calibration_end: remove hooks
    - on_finalize: one line that says what was smoothed and what was not

    Args:
        affinity_power: power of the combine weight: 1 as in the paper, 0 for plain AWQ on routed
            tokens, 2 for the exact squared error of the block's output.
        min_effective_tokens: an expert's linear with fewer effective tokens, ``(sum a)^2 /
            sum a^2``, borrows second moments from its layer. ``None`` means its number of inputs.
        seed: of the sample of layer tokens that starved experts borrow from.
        clip: also clamp outliers of weights where that lowers the same weighted error
            (:func:`moeq_plugin.core.clip.clip_weight`), in MLPs, values and attention outputs;
            queries and keys are left alone since a softmax stands behind them. The host has no
            clipping; the paper's looks at the weights only. For a quantizer that rounds to
            nearest: GPTQ after it takes clamped weights for the true ones.
    """

    affinity_power: float = Field(default=1.0, ge=0)
    min_effective_tokens: float | None = Field(default=None, ge=0)
    seed: int = 0
    clip: bool = False

    _run: Run = PrivateAttr()  # from on_initialize until the oneshot ends: it holds the model
    _record: RunRecord = PrivateAttr()  # which outlives the run

    @property
    def record(self) -> RunRecord:
        """Return what the last run has done so far; there is none before the first."""
        return self._record

    @field_serializer("offload_device")
    def _device_name(self, device: torch.device | Sentinel | None) -> str | None:
        # recipe.yaml could not be read back with a torch.device or the host's Sentinel in it
        return None if device is None else str(device)

    @field_validator("offload_device", mode="wrap")
    @classmethod
    def _named_device(cls, device: object, validate: ValidatorFunctionWrapHandler) -> object:
        left_to_the_host = AWQModifier.model_fields["offload_device"].default
        if str(device) == str(left_to_the_host):
            return left_to_the_host  # whose own validation refuses it
        return validate(torch.device(device) if isinstance(device, str) else device)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the request against model and data, find mappings and try them.

        Raises:
            ValueError: if the request cannot succeed; nothing has been changed then.
        """
        layers = linear_moe_layers(state.model)
        check_request(type(self).__name__, state, layers)
        places.stage_running_output()
        request = Request(
            affinity_power=self.affinity_power,
            min_effective_tokens=self.min_effective_tokens,
            seed=self.seed,
            clip=self.clip,
        )
        self._run = Run(self, request, state, layers)
        self._record = self._run.record
        with_oneshot = ExitStack()
        with_oneshot.callback(self._forget_run)
        undo_with_oneshot(with_oneshot)
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Register the hooks that observe what is quantized."""
        self._run.begin(state, event)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: Sequence[nn.Module] = (), **kwargs: Any
    ) -> None:
        """Smooth the layer that has just been calibrated, then clip it."""
        self._run.finish_layer(state, event)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Note what no batch has called, then remove hooks."""
        self._run.end(state, event)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Name the experts that borrowed, then say in one line what was smoothed."""
        self._run.report(state)
        return True

    def _forget_run(self) -> None:
        del self._run
        forget_failure(self)
