"""MoEQuantAWQModifier: AWQ whose scales for an expert are judged by the tokens that it serves."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.offload import disable_offloading
from llmcompressor.core import Event, State
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import ResolvedMapping
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from pydantic import Field, PrivateAttr, field_serializer, field_validator
from torch import nn

from moeq_plugin.core.awq import mean_output_loss
from moeq_plugin.integrations.llm_compressor import preflight
from moeq_plugin.integrations.llm_compressor.awq.batches import merged, without_padding
from moeq_plugin.integrations.llm_compressor.awq.calibration import SmoothingCalibration
from moeq_plugin.integrations.llm_compressor.awq.clipping import clip_linear, clippable
from moeq_plugin.integrations.llm_compressor.awq.mappings import (
    FoundMappings,
    find_mappings,
    judged_alone,
)
from moeq_plugin.integrations.llm_compressor.awq.preflight import check_mappings, check_request
from moeq_plugin.integrations.llm_compressor.awq.unquantized import unquantized
from moeq_plugin.integrations.llm_compressor.calibration import ranks
from moeq_plugin.integrations.llm_compressor.calibration.guard import guard
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.integrations.llm_compressor.checkpoint.saving import prepare_saving
from moeq_plugin.integrations.llm_compressor.host import (
    listen_to_batches,
    run_routed_tokens_only,
    summed_already,
    undo_with_oneshot,
    without_pinning,
)
from moeq_plugin.models.moe import MoELayer, find_moe_layers
from moeq_plugin.records.environment import run_facts, versions
from moeq_plugin.records.run import Basis, RunRecord

_SETTINGS = ("affinity_power", "min_effective_tokens", "seed", "clip", "duo_scaling", "n_grid")
_NO_TOKENS = "no token reached it"


@dataclass(frozen=True)
class _Moments:
    """Second moments of a linear's inputs, guarded: ``[in, in]``, and what they rest on."""

    hessian: torch.Tensor
    weight_sum: float
    basis: Basis
    effective_tokens: float


class MoEQuantAWQModifier(AWQModifier):
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

    @field_serializer("offload_device")
    def _device_name(self, device: Any) -> Any:
        # recipe.yaml could not be read back with the host's own torch.device in it
        return str(device) if isinstance(device, torch.device) else device

    @field_validator("offload_device", mode="before")
    @classmethod
    def _named_device(cls, device: Any) -> Any:
        return torch.device(device) if isinstance(device, str) else device

    _layers: list[MoELayer] = PrivateAttr(default_factory=list)
    _found: FoundMappings = PrivateAttr(default_factory=FoundMappings)
    _names: dict[nn.Module, str] = PrivateAttr(default_factory=dict)
    _calibration: SmoothingCalibration | None = PrivateAttr(default=None)
    _padding: PaddingWatch | None = PrivateAttr(default=None)
    _direct_masks: list[torch.Tensor | None] = PrivateAttr(default_factory=list)  # basic pipeline
    _record: RunRecord | None = PrivateAttr(default=None)
    _began: float = PrivateAttr(default=0.0)
    _moments: dict[nn.Linear, _Moments] = PrivateAttr(default_factory=dict)
    _merged: set[nn.Module] = PrivateAttr(default_factory=set)
    _scales: dict[nn.Module, torch.Tensor] = PrivateAttr(default_factory=dict)
    _clippable: set[nn.Module] = PrivateAttr(default_factory=set)
    _judged: tuple[nn.Linear, torch.Tensor] | None = PrivateAttr(default=None)
    _output_masks: list[torch.Tensor | None] = PrivateAttr(default_factory=list)  # of its block
    _undo: contextlib.ExitStack = PrivateAttr(default_factory=contextlib.ExitStack)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check the request against model and data, find mappings and try them.

        Raises:
            ValueError: if the request cannot succeed; nothing has been changed then.
        """
        model = state.model
        self._layers = find_moe_layers(model)
        check_request(type(self).__name__, state, self._layers)
        preflight.check_running_output_dir()
        self._began = time.monotonic()
        self._names = {module: name for name, module in model.named_modules()}
        given = self.mappings
        if given is None:
            with ranks.in_turn(), disable_offloading():
                self._found = find_mappings(model, self._layers)
            self.mappings = []  # or the host would look them up by the name of the architecture
        super().on_initialize(state, **kwargs)
        self.mappings = given
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Register the hooks that observe what is quantized."""
        padding = self._padding = PaddingWatch(state)
        listen_to_batches(padding, self._undo)
        # a token that is not routed has weight zero: do not compute what will not count
        run_routed_tokens_only(state.model, self._undo)
        undo_with_oneshot(self._undo)
        self._calibration = SmoothingCalibration(
            affinity_power=self.affinity_power,
            weight_gate_proj=True,
            seed=self.seed,
            padding=padding,
        )
        super().on_calibration_start(state, event, **kwargs)
        settings = {name: getattr(self, name) for name in _SETTINGS}
        self._record = RunRecord(
            modifier=type(self).__name__,
            settings={**settings, "mappings": [asdict(x) for x in self.mappings or ()] or None},
            versions=versions(),
            left_out=dict(self._found.left_out),
            model=getattr(state.model, "name_or_path", ""),
            calibration=f"{len(state.data.calib)} batches of the data given to oneshot",
        )
        prepare_saving(state.model, self._layers, self._record, lambda _directory: None)
        linears = [x for x in map(judged_alone, self._resolved_mappings) if x is not None]
        if self.clip:
            self._clippable = set(clippable(state.model))
            linears += [x for x in self._clippable if x not in linears]
        self._calibration.attach(state.model, self._layers, linears, self.register_hook)
        self._calibration.watch(self._resolved_mappings, self.register_hook)
        self.register_hook(state.model, self._note_mask, "forward_pre", with_kwargs=True)

    def on_sequential_epoch_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Smooth the layer that has just been calibrated, then clip it."""
        calibration = self._calibration
        assert calibration is not None  # set in on_calibration_start
        if is_distributed():
            calibration.sum_over_ranks(self._resolved_mappings, self._names)
        calibration.check_finite(self._names)
        with torch.no_grad(), disable_offloading(), unquantized(state.model):
            self._guard_moments(calibration)
            self._merge_batches()
            wanted = self._hand_over(calibration)
            with ranks.own_copies(self._modules_of_layer(calibration)):
                with without_pinning(), summed_already():
                    super().on_sequential_epoch_end(state, event, **kwargs)
                self._note_skipped(wanted)
                if self.clip:
                    self._clip_layer()
        calibration.clear_layer()
        self._moments.clear()
        self._scales.clear()
        self._merged.clear()

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Note what no batch has called, then remove hooks."""
        assert self._record is not None  # set in on_calibration_start
        for mapping in self._resolved_mappings:
            if mapping.smooth_name not in self._record.smoothed:
                self._record.left_out.setdefault(mapping.smooth_name, _NO_TOKENS)
        self._undo.close()
        self._calibration = None
        super().on_calibration_end(state, event, **kwargs)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Name the experts that borrowed, then say in one line what was smoothed."""
        record = self._record
        assert record is not None  # set in on_calibration_start
        record.run = run_facts(self._began)
        borrowed = [name for name, of in record.smoothed.items() if of["basis"] is not Basis.OWN]
        if borrowed:
            logger.warning(
                f"{len(borrowed)} modules saw fewer effective tokens than they have features; "
                f"their scales rest on their layer's tokens too: {', '.join(borrowed)}"
            )
        unseen = _NO_TOKENS in record.left_out.values()
        logger.log("WARNING" if unseen else "INFO", record.summary(len(record.smoothed)))
        self._layers, self._found, self._names = [], FoundMappings(), {}
        return super().on_finalize(state, **kwargs)

    def _set_resolved_mappings(self, model: nn.Module) -> None:
        """Take the mappings that were given or found, as far as they are for quantized weights."""
        if self.mappings is not None:
            super()._set_resolved_mappings(model)
        else:
            self._resolved_mappings = self._found.only_quantized()
        check_mappings(self._resolved_mappings, self._layers, self._names)

    def _setup_activation_cache_hooks(self) -> None:
        """Let the host keep the arguments of blocks; linears are judged by second moments."""
        everything = self._resolved_mappings
        self._resolved_mappings = [m for m in everything if judged_alone(m) is None]
        super()._setup_activation_cache_hooks()
        self._resolved_mappings = everything

    def _guard_moments(self, calibration: SmoothingCalibration) -> None:
        for observation in calibration.observations.values():
            hessian, weight_sum, basis = guard(
                observation,
                calibration,
                min_effective_tokens=self.min_effective_tokens,
                shrinkage=1.0,
            )
            effective = observation.moments.effective_tokens
            moments = _Moments(hessian, weight_sum, basis, effective)
            self._moments.update(dict.fromkeys(observation.linears, moments))

    def _hand_over(self, calibration: SmoothingCalibration) -> list[str]:
        """Give the host what it searches by; return the names of mappings it is to smooth."""
        assert self._record is not None  # set in on_calibration_start
        self._smooth_activation_stats.clear()  # of the host's own hooks, which count padding
        for mapping in self._resolved_mappings:
            magnitude = calibration.magnitudes.get(mapping.smooth_name)
            if magnitude is None:
                continue  # of another layer
            linear = judged_alone(mapping)
            moments = self._moments[linear] if linear is not None else None
            if moments.basis is Basis.NONE if moments is not None else magnitude.count == 0:
                self._record.left_out[mapping.smooth_name] = _NO_TOKENS
                continue
            stats = [magnitude.total, magnitude.count]
            if moments is not None and linear is not None:
                # the host wants an input to run and none is needed: the loss asks the moments
                cache = IntermediatesCache(None, self.offload_device)
                cache.append({"input": torch.zeros_like(linear.weight[:1])})
                self._parent_args_cache[linear] = cache
                if moments.basis is not Basis.OWN:  # whose absolute values nobody has summed up
                    squares = moments.hessian.diagonal() / (2 * moments.weight_sum)
                    stats = [squares.sqrt(), torch.ones(())]
            self._smooth_activation_stats[mapping.smooth_name] = stats
        return list(self._smooth_activation_stats)

    def _merge_batches(self) -> None:
        """Let the layer's MoE block, which treats every token by itself, run on few batches."""
        for layer in self._layers:
            cache = self._parent_args_cache.get(layer.block)
            if not cache:
                continue  # of another layer, or nothing smooths it
            batches = merged(cache, self._masks())
            if batches is not None:
                self._parent_args_cache[layer.block] = batches
                self._merged.add(layer.block)

    def _modules_of_layer(self, calibration: SmoothingCalibration) -> list[nn.Module]:
        """Return what the layer's smoothing and clipping change, in the order of their names."""
        changed = set(self._moments) & self._clippable
        for mapping in self._resolved_mappings:
            if mapping.smooth_name in calibration.magnitudes:
                changed |= {mapping.smooth_layer, *mapping.balance_layers}
        return sorted(changed, key=self._names.__getitem__)

    def _compute_best_scale(
        self,
        mapping: ResolvedMapping,
        fp16_outputs: list[torch.Tensor],
        orig_layer_weights: dict[nn.Module, torch.Tensor],
    ) -> torch.Tensor:
        """Let the host search, and note what it found."""
        linear = judged_alone(mapping)
        self._judged = None if linear is None else (linear, orig_layer_weights[linear])
        self._output_masks = [] if mapping.parent in self._merged else self._masks()
        scales = super()._compute_best_scale(mapping, fp16_outputs, orig_layer_weights)
        self._scales.update(dict.fromkeys(mapping.balance_layers, scales))
        moments = self._moments[linear] if linear is not None else None
        assert self._record is not None  # set in on_calibration_start
        self._record.smoothed[mapping.smooth_name] = {
            "judged by": mapping.parent_name,
            "weighted": linear is not None and self._has_token_weights(linear),
            "basis": moments.basis if moments is not None else Basis.OWN,
            "effective_tokens": moments.effective_tokens if moments is not None else None,
            "loss": self._error_metrics[-1]["best_error"],
            "loss_unscaled": self._error_metrics[-1]["initial_error"],
        }
        return scales

    def _compute_loss(
        self, fp16_outputs: list[torch.Tensor], int_w_outputs: list[torch.Tensor]
    ) -> float:
        """Return the mean squared change of outputs that the search is to make small.

        Of a linear judged alone, over its tokens with their weights; of a block, the host's, over
        all tokens that are no padding, in which combine weights act already.
        """
        if self._judged is not None:
            linear, original = self._judged
            moments = self._moments[linear]
            change = linear.weight - original
            loss = mean_output_loss(change, moments.hessian, moments.weight_sum)
            # the same on all ranks but for rounding: one choice, or scales would not match
            return ranks.mean_over_ranks(loss, 1, change.device)
        if self._output_masks:
            fp16_outputs = list(map(without_padding, fp16_outputs, self._output_masks))
            int_w_outputs = list(map(without_padding, int_w_outputs, self._output_masks))
        mean = float(super()._compute_loss(fp16_outputs, int_w_outputs))
        count = sum(outputs.numel() for outputs in fp16_outputs)
        return ranks.mean_over_ranks(mean, count, fp16_outputs[0].device)

    def _note_mask(self, _model: nn.Module, _args: object, kwargs: dict[str, Any]) -> None:
        self._direct_masks.append(kwargs.get("attention_mask"))

    def _masks(self) -> list[torch.Tensor | None]:
        assert self._padding is not None  # set in on_calibration_start
        cached = [batch.get("attention_mask") for batch in self._padding.batches]
        return cached or self._direct_masks

    def _has_token_weights(self, linear: nn.Linear) -> bool:
        assert self._calibration is not None  # set while a layer is smoothed
        seat = self._calibration.seat_of(linear)
        is_weighted = seat is not None and not (
            seat.expert is None and seat.layer.shared_gate is None
        )
        return is_weighted and self.affinity_power > 0

    def _note_skipped(self, wanted: list[str]) -> None:
        assert self._record is not None  # set in on_calibration_start
        for name in wanted:
            if name not in self._record.smoothed:
                self._record.left_out[name] = "its output holds NaN or infinity"

    def _clip_layer(self) -> None:
        assert self._record is not None  # set in on_calibration_start
        for linear, moments in self._moments.items():
            if linear in self._clippable and moments.basis is not Basis.NONE:
                share = clip_linear(linear, moments.hessian, self._scales.get(linear))
                if share is not None:
                    self._record.clipped[self._names[linear]] = share
