"""Budgets and kept state: what a modifier does that chooses schemes by what they lose."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from compressed_tensors.distributed import is_source_process
from llmcompressor.core import State
from loguru import logger
from pydantic import Field, PrivateAttr
from torch import nn

from moeq_plugin.integrations.llm_compressor import places, recipe
from moeq_plugin.integrations.llm_compressor.allocation.allocator import BitAllocator
from moeq_plugin.integrations.llm_compressor.allocation.options import DEFAULT_OPTIONS
from moeq_plugin.integrations.llm_compressor.allocation.request import AllocationRequest
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity import SensitivityModifier
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity_config import SensitivityConfig
from moeq_plugin.integrations.llm_compressor.checkpoint.reader_limits import budget_limit
from moeq_plugin.integrations.llm_compressor.frozen_fields import HOST_STATE
from moeq_plugin.integrations.llm_compressor.moequant.identity import model_digest
from moeq_plugin.integrations.llm_compressor.moequant.request import Request
from moeq_plugin.integrations.llm_compressor.moequant.routed_modifier import RoutedModifier
from moeq_plugin.integrations.llm_compressor.moequant.run_state import RunState
from moeq_plugin.models.scheme_units import Target
from moeq_plugin.records.environment import versions


class BudgetedModifier(RoutedModifier):
    """A modifier that may be given a budget in the place of a scheme, and keeps what it finishes.

    Given ``bits_per_weight``, ``size_gb`` or ``allocation``, it measures what every linear loses
    at each option and chooses those that lose least. A subclass says in :meth:`_attach` what
    becomes of the choice.

    Args:
        bits_per_weight: instead of a scheme, what all tensors stored for the targeted linears may
            take per weight; every unit of the target gets the option that makes the predicted
            loss least.
        size_gb: likewise, what all tensors of the checkpoint may take, in 1e9 bytes.
        options: schemes to choose from, such as ``W4A16``, ``W3A16_G64`` or ``UNQUANTIZED``; those
            with 2 and 3 bits, for which vLLM needs Humming kernels, only if they are named.
        target: what will read the checkpoint (:class:`Target`), which decides what has to share a
            scheme.
        robust: minimise the loss of the worst domain relative to uniform bits, not the mean.
        sensitivity: how to measure (:class:`SensitivityConfig`), or the file of a table measured
            before.
        allocation: the file of an allocation made before, to be applied as it is.
        work_dir: where to keep what is finished, layer by layer. A run that was killed continues
            there when it is started again, and ends with the same checkpoint, bit for bit. Takes
            as much room as the targeted weights in 16 bit.
    """

    bits_per_weight: float | None = None
    size_gb: float | None = None
    options: list[str] = Field(default_factory=lambda: list(DEFAULT_OPTIONS))
    target: Target = Target.VLLM
    robust: bool = False
    sensitivity: SensitivityConfig | str = Field(default_factory=SensitivityConfig)
    allocation: str | None = None
    # not in recipe.yaml: a rerun elsewhere has no business in the directory of this one
    work_dir: str | None = Field(default=None, exclude=True)

    _request: Request = PrivateAttr()
    _allocator: BitAllocator | None = PrivateAttr()  # None where schemes were asked for
    _kept_state: RunState | None = PrivateAttr()  # None without work_dir

    def sensitivity_modifier(self) -> SensitivityModifier:
        """Return what measures for this modifier, rounding as it does.

        Raises:
            ValueError: if the sensitivities are in a file, so that there is nothing to measure.
        """
        if not isinstance(self.sensitivity, SensitivityConfig):
            raise ValueError(f"the sensitivities are in {self.sensitivity}: nothing to measure")
        shared = set(SensitivityModifier.model_fields) & set(type(self).model_fields) - HOST_STATE
        asked = {name: getattr(self, name) for name in shared}
        return SensitivityModifier(config=self.sensitivity, **asked)

    @abstractmethod
    def _attach(self, state: State) -> None:
        """Attach what was asked for or chosen, set record and phases, and prepare saving."""

    def _declare_run(self, state: State) -> None:
        """After the last refusal: tell the host, hold ``work_dir``, and attach what is known."""
        self._declare_data()
        if self._kept_state is not None:
            self._undo.enter_context(self._kept_state.held())
        if self._allocator is None or self._allocator.is_decided:
            self._attach(state)
        elif limit := budget_limit(self._start.layers, self.options):
            logger.warning(limit)  # hours of measuring come now

    def _begin_pass(self, state: State) -> None:
        """Measure and choose where that has still to be done, then register hooks."""
        if self._kept_state is not None:
            # only now are the data known, in a run that wrote them itself too
            self._kept_state.begin(state.data.calib)
        if self._allocator is not None and not self._allocator.is_decided:
            kept = self._kept_state.measurements if self._kept_state is not None else None
            self._allocator.measure(self.sensitivity_modifier(), state, kept)
            # the host is about to run the pass: schemes have to be there before hooks look at them
            self._attach(state)
        super()._begin_pass(state)

    def _keep_layer(self) -> None:
        """Keep what all phases have made of a layer as one part.

        A run that goes on would otherwise find part of a layer quantized, and the inputs of the
        rest would not be those that the first run has seen.
        """
        if self._kept_state is not None and is_source_process():
            self._kept_state.keep_noted()

    def _text_path(self) -> Path | None:
        if self._kept_state is None:
            return None
        self._kept_state.begin(None)  # before anything is written: is the directory this run's?
        return self._kept_state.text

    def _find_kept_state(self, model: nn.Module) -> RunState | None:
        """Return what is kept of this run in ``work_dir``, identified by all it depends on."""
        if self.work_dir is None:
            return None
        sensitivity = self.sensitivity if isinstance(self.sensitivity, str) else None
        places.check_apart(
            model, self.work_dir, sensitivity=sensitivity, allocation=self.allocation
        )
        identity = {
            "model": model_digest(model),
            "own text": not self._start.has_data,
            **{f"setting {name}": value for name, value in self.settings().items()},
            **{f"version of {package}": number for package, number in versions().items()},
        }
        return RunState(self.work_dir, identity | recipe.identity(self))

    def _make_allocator(self, model: nn.Module) -> BitAllocator | None:
        """Return what chooses schemes, ``None`` where they were asked for."""
        asked = AllocationRequest(
            bits_per_weight=self.bits_per_weight,
            size_gb=self.size_gb,
            options=tuple(self.options),
            target=self.target,
            robust=self.robust,
            sensitivity=self.sensitivity,
            allocation=self.allocation,
        )
        if not asked.is_asked:
            return None
        asked.check_alone(self.scheme, self.config_groups)
        return BitAllocator.of(
            asked,
            model,
            self._start.layers,
            targets=self.targets,
            ignore=self.ignore,
            weight_observer=self.weight_observer,
        )

    def _save_allocation(self, directory: Path) -> None:
        """Write table and allocation beside a checkpoint, if there are any."""
        if self._allocator is not None:
            self._allocator.save(directory)
