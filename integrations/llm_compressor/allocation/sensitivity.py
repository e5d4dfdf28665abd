"""Measure what every linear loses at every option, in the host's layer-by-layer pass.

Each layer is rounded to each option by the quantizer that ships, with the second moments of one
half of the calibration sequences, and judged with those of the other half. The model is not
changed: every layer hands on what it computes with its original weights.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from compressed_tensors.distributed import is_distributed
from compressed_tensors.offload import disable_offloading
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr
from torch import distributed, nn

from moeq_plugin.core.sensitivity import LayerInteraction, SensitivityTable
from moeq_plugin.integrations.llm_compressor.allocation.held_out_loss import LayerScores
from moeq_plugin.integrations.llm_compressor.allocation.interactions import measure_interaction
from moeq_plugin.integrations.llm_compressor.allocation.options import (
    DEFAULT_OPTIONS,
    Option,
    parse_options,
)
from moeq_plugin.integrations.llm_compressor.allocation.target_linears import (
    check_fit,
    other_bytes,
    target_linears,
)
from moeq_plugin.integrations.llm_compressor.allocation.trial_rounding import trial_rounding
from moeq_plugin.integrations.llm_compressor.calibration import ranks
from moeq_plugin.integrations.llm_compressor.calibration.data_split import Part, domains_of
from moeq_plugin.integrations.llm_compressor.calibration.guard import guard
from moeq_plugin.integrations.llm_compressor.calibration.observations import (
    Calibration,
    Observation,
)
from moeq_plugin.integrations.llm_compressor.calibration.padding import PaddingWatch
from moeq_plugin.integrations.llm_compressor.checkpoint.reader_limits import expert_linears
from moeq_plugin.integrations.llm_compressor.host import (
    listen_to_batches,
    run_routed_tokens_only,
    undo_with_oneshot,
)
from moeq_plugin.integrations.llm_compressor.solving import Job
from moeq_plugin.models.gradients import OutputGradients
from moeq_plugin.models.moe import MoELayer, find_moe_layers
from moeq_plugin.models.scheme_units import unit_labels
from moeq_plugin.records.progress import layer_progress, report_progress


@dataclass(frozen=True)
class SensitivityConfig:
    """How to measure sensitivities.

    Attributes:
        gradient: take ``g`` from a backward pass through the whole model. Without, losses are
            squared errors of what a block adds to the residual stream; for models that do not
            fit.
        gradient_tokens: calibration tokens that the backward pass sees.
        router_weight: what a nat of KL divergence of a router's choice counts, in nats of the
            prediction.
        domain_names: names of the values 0, 1, ... of the data set's column ``domain``.
        undercovered_tokens: an expert with fewer effective tokens is undercovered.
        interactions: measure whether errors of a layer's experts add up; keeps the layer's
            weights at every option at once.
    """

    gradient: bool = True
    gradient_tokens: int = 16384
    router_weight: float = 0.0
    domain_names: tuple[str, ...] | None = None
    undercovered_tokens: float = 16.0
    interactions: bool = False

    def __post_init__(self) -> None:
        if self.gradient_tokens < 1:
            raise ValueError(f"gradient_tokens must be at least 1, got {self.gradient_tokens}")
        if not 0 <= self.router_weight < math.inf:
            raise ValueError(f"router_weight must be finite and >= 0, got {self.router_weight}")


class SensitivityModifier(Modifier):
    """Measure a :class:`moeq_plugin.SensitivityTable`; nothing is quantized.

    The loss of linear ``l`` at option ``b`` is ``E[g^2 . (dW_b x)^2] / 2`` in nats per token:
    ``dW_b`` what MoEQuant's rounding to ``b`` changes, ``x`` the inputs of held-out tokens
    weighted by the squared combine weight, ``g`` the gradient of the model's own log-likelihood
    at the output. Losses of several linears add up.

    MoQa (arXiv:2503.21135) names the stages and gives no formula that can be computed; this is
    the sum of squares that GEMQ (arXiv:2605.23078) uses at block outputs, with the error of the
    quantizer that ships in place of rounding to nearest.

    Lifecycle:

    - on_initialize: check options and targets
    - on_calibration_start: one backward pass per batch for ``g``; hooks for second moments
    - on_sequential_epoch_end: round and judge one layer at every option
    - on_calibration_end: put the table together

    Args:
        options: schemes to choose from.
        targets: as for quantization.
        ignore: as for quantization.
        config: how to measure.
        affinity_power: as for quantization.
        weight_gate_proj: as for quantization.
        min_effective_tokens: as for quantization.
        shrinkage: as for quantization.
        seed: of samples and draws.
        block_size: as for quantization.
        dampening_frac: as for quantization.
        weight_observer: as for quantization.
    """

    options: list[str] = Field(default_factory=lambda: list(DEFAULT_OPTIONS))
    targets: list[str] = Field(default_factory=lambda: ["Linear"])
    ignore: list[str] = Field(default_factory=list)
    config: SensitivityConfig = Field(default_factory=SensitivityConfig)
    affinity_power: float = Field(default=1.0, ge=0)
    weight_gate_proj: bool = True
    min_effective_tokens: float | None = Field(default=None, ge=0)
    shrinkage: float = Field(default=1.0, ge=0)
    seed: int = 0
    block_size: int = 128
    dampening_frac: float | None = 0.01
    weight_observer: str | None = None
    requires_calibration_data: bool = True

    _options: list[Option] = PrivateAttr(default_factory=list)
    _layers: list[MoELayer] = PrivateAttr(default_factory=list)
    _names: dict[nn.Linear, str] = PrivateAttr(default_factory=dict)
    _rounding: Calibration | None = PrivateAttr(default=None)
    _judging: list[tuple[Part, Calibration]] = PrivateAttr(default_factory=list)
    _losses: dict[str, np.ndarray] = PrivateAttr(default_factory=dict)
    _row_weights: dict[nn.Linear, torch.Tensor] | None = PrivateAttr(default=None)
    _undo: contextlib.ExitStack = PrivateAttr(default_factory=contextlib.ExitStack)
    _undercovered: set[str] = PrivateAttr(default_factory=set)
    _interactions: dict[str, LayerInteraction] = PrivateAttr(default_factory=dict)
    _interacting: set[nn.Linear] = PrivateAttr(default_factory=set)
    _domains: tuple[str, ...] = PrivateAttr(default=())
    _table: SensitivityTable | None = PrivateAttr(default=None)

    @property
    def table(self) -> SensitivityTable:
        """Return what was measured.

        Raises:
            RuntimeError: before calibration has ended.
        """
        if self._table is None:
            raise RuntimeError("nothing has been measured yet: pass this modifier to oneshot")
        return self._table

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check options and targets.

        Raises:
            ValueError: if an option is unknown or a target matches nothing.
        """
        self._options = parse_options(self.options, self.weight_observer)
        self._layers = find_moe_layers(state.model)
        self._names = target_linears(state.model, self._layers, self.targets, self.ignore)
        check_fit(self._names, self._options)
        if self.config.interactions:
            self._interacting = {m for layer in self._layers for m in expert_linears(layer)}
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Measure gradients, then register the hooks that accumulate second moments."""
        ours = Counter(d for batch in state.data.calib for d in domains_of(batch))
        before, counts = ranks.over_ranks(ours)
        self._domains = self._names_of_domains(counts)
        run_routed_tokens_only(state.model, self._undo)
        undo_with_oneshot(self._undo)
        report_progress(layer_progress("measure", (), self._names.values()))
        if self.config.gradient:
            logger.info("sensitivity: one backward pass per calibration batch")
            self._row_weights = self._gradients(state).row_weights()
        watch = PaddingWatch(state)
        listen_to_batches(watch, self._undo)
        rounding = Part(watch, half=0, before=before)
        self._rounding = self._calibration(rounding, self.affinity_power)
        parts = [Part(watch, half=1, domain=domain, before=before) for domain in sorted(counts)]
        self._judging = [(part, self._calibration(part, 2.0)) for part in parts]
        for calibration in (self._rounding, *(c for _, c in self._judging)):
            calibration.attach(state.model, self._layers, list(self._names), self.register_hook)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[nn.Module], **kwargs: Any
    ) -> None:
        """Round and judge the linears that were called since the last layer."""
        rounding = self._rounding
        assert rounding is not None  # the host calls on_calibration_start first
        owners = self._share_out(rounding) if is_distributed() else None
        with torch.no_grad(), disable_offloading():
            jobs = [self._guard(observation) for observation in rounding.observations.values()]
            self._undercovered |= {
                self._names[linear]
                for job in jobs
                for linear in job.linears
                if job.effective_tokens < self.config.undercovered_tokens
            }
            rounded = self._judge(jobs)
            if owners is not None:
                self._exchange(owners, rounded)
            self._measure_interactions(rounded)
        for calibration in (rounding, *(c for _, c in self._judging)):
            calibration.clear_layer()
        pending = [name for name in self._names.values() if name not in self._losses]
        report_progress(layer_progress("measure", self._losses, pending))

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Put the table together and remove hooks."""
        num_bytes = np.array([[o.num_bytes(m) for o in self._options] for m in self._names])
        unseen = [name for name in self._names.values() if name not in self._losses]
        if unseen:
            logger.warning(
                f"{len(unseen)} linears were never called while calibrating and keep the option "
                f"with the most bytes: {', '.join(unseen[:5])}"
            )
        fits = np.array([[o.fits(m) for o in self._options] for m in self._names])
        largest = np.where(fits, num_bytes, 0).max(1, keepdims=True)
        keep = np.where(fits & (num_bytes == largest), 0.0, np.inf)
        names = list(self._names.values())
        num_domains = len(self._judging)
        losses = [
            self._losses.get(name, np.broadcast_to(keep[row], (num_domains, len(self._options))))
            for row, name in enumerate(names)
        ]
        self._table = SensitivityTable(
            rows=tuple(names),
            options=tuple(self.options),
            domains=self._domains,
            loss=np.stack(losses, axis=1),
            num_bytes=num_bytes,
            num_weights=np.array([m.weight.numel() for m in self._names]),
            units=unit_labels(names, self._layers, dict(state.model.named_modules())),
            fixed_bytes=other_bytes(state.model, self._names),
            undercovered=tuple(name for name in names if name in self._undercovered),
            interactions=self._interactions,
        )
        self._undo.close()
        self.remove_hooks()

    def _gradients(self, state: State) -> OutputGradients:
        """Run the backward passes; with several ranks, each those of its own batches."""
        seen = sum(
            int(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum())
            for batch in state.data.calib
        )
        before, _ = ranks.over_ranks(Counter({0: seen}))
        gradients = OutputGradients(self._names, self._layers)
        gradients.measure(
            state.model,
            state.data.calib,
            max_tokens=self.config.gradient_tokens,
            tokens_before=before[0],
            router_weight=self.config.router_weight,
            seed=self.seed,
        )
        if is_distributed():
            gradients.sum_over_processes(distributed.all_reduce)
        return gradients

    def _share_out(self, rounding: Calibration) -> dict[str, int]:
        """Add up what all ranks have seen; return which of them judges each linear."""
        for calibration in (rounding, *(c for _, c in self._judging)):
            ranks.sum_over_ranks(calibration, self._names)
        return ranks.keep_own_share(rounding, self._names)

    def _exchange(
        self, owners: Mapping[str, int], rounded: dict[nn.Linear, list[torch.Tensor]]
    ) -> None:
        """Give every rank what each has judged."""
        ours = {
            name: self._losses[name]
            for name, owner in owners.items()
            if owner == distributed.get_rank()
        }
        for losses, undercovered in ranks.gather((ours, self._undercovered)):
            self._losses |= losses
            self._undercovered |= undercovered
        modules = {n: linear for linear, n in self._names.items() if linear in self._interacting}
        ranks.give_to_all(
            rounded,
            {name: owner for name, owner in owners.items() if name in modules},
            modules,
            lambda linear: sum(o.scheme is not None and o.fits(linear) for o in self._options),
        )

    def _judge(self, jobs: list[Job]) -> dict[nn.Linear, list[torch.Tensor]]:
        """Fill in the losses of a layer; return the weights of experts at every option."""
        scores = [
            LayerScores(judging, sum(ranks.gather(part.num_tokens)), self._names, self._row_weights)
            for part, judging in self._judging
        ]
        called = [linear for job in jobs for linear in job.linears]
        shape = (len(scores), len(self._options))
        self._losses |= {self._names[linear]: np.full(shape, np.inf) for linear in called}
        rounded: dict[nn.Linear, list[torch.Tensor]] = {}
        for index, option in enumerate(self._options):
            if option.scheme is None:
                for linear in called:
                    self._losses[self._names[linear]][:, index] = 0.0
                continue
            for linear, difference in trial_rounding(
                option,
                jobs,
                block_size=self.block_size,
                dampening_frac=self.dampening_frac or 0.0,
            ):
                losses = [score.loss(linear, difference, option) for score in scores]
                self._losses[self._names[linear]][:, index] = losses
                if linear in self._interacting:
                    weight = linear.weight + difference.to(linear.weight.dtype)
                    rounded.setdefault(linear, []).append(weight)
        return rounded

    def _measure_interactions(self, rounded: dict[nn.Linear, list[torch.Tensor]]) -> None:
        _, judging = self._judging[0]
        for layer in self._layers:
            first = layer.expert(0).down_proj
            if first in rounded and layer.experts in judging.samples:
                weights = None if self._row_weights is None else self._row_weights[first]
                sample = judging.samples[layer.experts]
                found = measure_interaction(layer, sample, rounded, weights)
                if found is not None:
                    self._interactions[layer.name] = found

    def _calibration(self, part: Part, affinity_power: float) -> Calibration:
        return Calibration(
            affinity_power=affinity_power,
            weight_gate_proj=self.weight_gate_proj,
            seed=self.seed,
            padding=part,
        )

    def _guard(self, observation: Observation) -> Job:
        """Return a job for all linears of an observation; its scheme is filled in per option."""
        assert self._rounding is not None
        hessian, weight_sum, basis = guard(
            observation,
            self._rounding,
            min_effective_tokens=self.min_effective_tokens,
            shrinkage=self.shrinkage,
        )
        effective_tokens = observation.moments.effective_tokens
        return Job(observation.linears, None, hessian, weight_sum, basis, effective_tokens)

    def _names_of_domains(self, counts: Counter[int]) -> tuple[str, ...]:
        """Return the names of the domains that there are.

        Raises:
            ValueError: if a domain has too few sequences to halve, or no name.
        """
        few = {domain: count for domain, count in counts.items() if count < 2}
        if few:
            raise ValueError(
                "one half of the calibration sequences rounds and the other judges: at least two "
                f"sequences are needed (of each domain), got {few}"
            )
        names = self.config.domain_names or tuple(str(d) for d in range(max(counts) + 1))
        if min(counts) < 0 or max(counts) >= len(names):
            raise ValueError(
                f"the column `domain` must hold 0 to {len(names) - 1} for the domains "
                f"{list(names)}, got {sorted(counts)}"
            )
        return tuple(names[domain] for domain in sorted(counts))
