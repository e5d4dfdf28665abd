"""The state of one measuring pass: every layer rounded to every option, and judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import torch
from compressed_tensors.distributed import is_distributed, is_source_process
from compressed_tensors.offload import disable_offloading
from loguru import logger
from torch import distributed, nn

from moeq_plugin.core.sensitivity import LayerInteraction, SensitivityTable
from moeq_plugin.integrations.llm_compressor.allocation.choices import Choices
from moeq_plugin.integrations.llm_compressor.allocation.halves import Halves
from moeq_plugin.integrations.llm_compressor.allocation.interactions import Interactions
from moeq_plugin.integrations.llm_compressor.allocation.losses import MeasuredLosses
from moeq_plugin.integrations.llm_compressor.allocation.trial_rounding import (
    GuardedMoments,
    TrialRounding,
)
from moeq_plugin.integrations.llm_compressor.calibration import ranks
from moeq_plugin.integrations.llm_compressor.calibration.observations import RegisterHook
from moeq_plugin.integrations.llm_compressor.kept_parts import KeptParts
from moeq_plugin.models.moe import MoELayer
from moeq_plugin.records.progress import layer_progress, report_progress


class Measurement:
    """Fills a :class:`moeq_plugin.SensitivityTable` while a calibration pass runs.

    Phases: :meth:`begin` before the pass, :meth:`finish_layer` whenever all batches have gone
    through a layer, :meth:`table` after the last one.

    Args:
        choices: the linears and their options.
        halves: observes the running layer.
        rounding: how a linear is rounded to an option.
        interactions: of which layers they are measured too.
        row_weights: ``[out]`` mean squared gradients of each linear, or ``None``; see
            :class:`HeldOutLoss`.
        undercovered_tokens: a linear with fewer effective tokens is undercovered.
        kept: where measured layers are kept and found again, ``None`` for nowhere.
    """

    def __init__(
        self,
        choices: Choices,
        halves: Halves,
        rounding: TrialRounding,
        interactions: Interactions,
        row_weights: Mapping[nn.Linear, torch.Tensor] | None,
        *,
        undercovered_tokens: float,
        kept: KeptParts | None,
    ) -> None:
        self._choices, self._halves, self._rounding = choices, halves, rounding
        self._interactions, self._row_weights = interactions, row_weights
        self._undercovered_tokens = undercovered_tokens
        self._undercovered: set[str] = set()  # names
        self._losses = MeasuredLosses(choices, len(halves.domains.numbers))
        self._kept = kept

    def begin(self, model: nn.Module, layers: list[MoELayer], register_hook: RegisterHook) -> None:
        """Register the hooks that observe the pass.

        Args:
            model: the model that will run.
            layers: its MoE layers.
            register_hook: the host's ``Modifier.register_hook``.
        """
        self._restore()  # before hooks are registered: what is measured gets none
        pending = set(self._losses.pending())
        linears = [linear for linear, name in self._choices.names.items() if name in pending]
        self._halves.attach(model, layers, linears, register_hook)

    def finish_layer(self) -> None:
        """Round and judge the linears that were called since the last layer."""
        rounding, names = self._halves.rounding, self._choices.names
        before, found_before = set(self._losses.by_name), set(self._interactions.found)
        if self._rounding.outputs is not None:
            observed = rounding.observations.values()
            self._rounding.outputs.measure(linear for of in observed for linear in of.linears)
        # each rank rounds and judges its share; those of other ranks are gone from `rounding` then
        owners = self._halves.share_out() if is_distributed() else None
        with torch.no_grad(), disable_offloading():
            moments = [
                self._rounding.guarded(observation, rounding)
                for observation in rounding.observations.values()
            ]
            self._undercovered |= {
                names[linear]
                for of in moments
                for linear in of.linears
                if of.effective_tokens < self._undercovered_tokens
            }
            rounded = self._judge(moments)
            if owners is not None:
                self._exchange(owners, rounded)
            # after the exchange: an expert's error needs the weights of all experts, on every rank
            self._interactions.measure(self._halves.first_judging, rounded, self._row_weights)
        self._halves.clear_layer()
        self._keep(
            self._losses.by_name.keys() - before, self._interactions.found.keys() - found_before
        )
        report_progress(layer_progress("measure", self._losses.by_name, self._losses.pending()))

    def table(self) -> SensitivityTable:
        """Return what was measured."""
        return self._choices.table(
            self._losses.complete(),
            self._halves.domains.names,
            undercovered=self._undercovered,
            interactions=self._interactions.found,
        )

    def _keep(self, measured: Set[str], interacting: Set[str]) -> None:
        """Write what was found of a layer.

        Args:
            measured: names of its linears, none if no batch has called any.
            interacting: names of the MoE layers whose interactions were found.
        """
        if self._kept is None or not measured or not is_source_process():
            return
        losses = {name: torch.from_numpy(self._losses.by_name[name]) for name in sorted(measured)}
        about = {
            "undercovered": sorted(self._undercovered & measured),
            "interactions": {name: vars(self._interactions.found[name]) for name in interacting},
        }
        self._kept.keep(about, losses)

    def _restore(self) -> None:
        """Take over what an earlier process has measured."""
        for about, losses in self._kept or ():
            self._losses.by_name |= {name: of.numpy() for name, of in losses.items()}
            self._undercovered |= set(about["undercovered"])
            self._interactions.found |= {
                name: LayerInteraction(**of) for name, of in about["interactions"].items()
            }
        if self._losses.by_name:
            logger.info(f"losses of {len(self._losses.by_name)} linears taken over")

    def _judge(self, moments: Sequence[GuardedMoments]) -> dict[nn.Linear, list[torch.Tensor]]:
        """Fill in the losses of a layer.

        Returns:
            The weights at every option, of those linears whose interactions are measured.
        """
        held_out = self._halves.held_out_losses(self._row_weights)
        called = [linear for of in moments for linear in of.linears]
        self._losses.expect(called)
        rounded: dict[nn.Linear, list[torch.Tensor]] = {}
        for index, option in enumerate(self._choices.options):
            # 16 bits lose nothing; what does not fit keeps the infinity that it was expected with
            if option.is_exact:
                for linear in called:
                    self._losses.put(linear, index, 0.0)
            for linear, difference in self._rounding.differences(option, moments):
                losses = [of_domain.loss(linear, difference, option) for of_domain in held_out]
                self._losses.put(linear, index, losses)
                # kept only where it is asked for: a layer at every option takes much memory
                if linear in self._interactions.linears:
                    weight = linear.weight + difference.to(linear.weight.dtype)
                    rounded.setdefault(linear, []).append(weight)
        return rounded

    def _exchange(
        self, owners: Mapping[str, int], rounded: dict[nn.Linear, list[torch.Tensor]]
    ) -> None:
        """Give every rank what each has judged.

        Args:
            owners: which rank has judged each linear.
            rounded: what :meth:`_judge` returned; filled in.
        """
        rank, losses = distributed.get_rank(), self._losses.by_name
        ours = {name: losses[name] for name, owner in owners.items() if owner == rank}
        for of_rank, undercovered in ranks.gather((ours, self._undercovered)):
            losses |= of_rank
            self._undercovered |= undercovered
        interacting = {
            name: linear
            for linear, name in self._choices.names.items()
            if linear in self._interactions.linears
        }
        ranks.give_to_all(
            rounded,
            {name: owner for name, owner in owners.items() if name in interacting},
            interacting,
            self._num_roundings,
        )

    def _num_roundings(self, linear: nn.Linear) -> int:
        options = self._choices.options
        return len([o for o in options if not o.is_exact and o.fits(linear)])
