"""From a budget to an option for every linear: check, measure, solve."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from compressed_tensors.distributed import is_source_process
from compressed_tensors.quantization import QuantizationScheme
from llmcompressor.core import State
from loguru import logger
from torch import nn

from moeq_plugin.core.allocation import Allocation, allocate_bits
from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.core.sensitivity import SensitivityTable
from moeq_plugin.integrations.llm_compressor.allocation.choices import Choices
from moeq_plugin.integrations.llm_compressor.allocation.decision import Decision
from moeq_plugin.integrations.llm_compressor.allocation.kept_measurements import (
    KeptMeasurements,
)
from moeq_plugin.integrations.llm_compressor.allocation.request import AllocationRequest
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity import (
    SensitivityModifier,
    measure_sensitivity,
)
from moeq_plugin.models.moe import MoELayer
from moeq_plugin.models.scheme_units import Target


class BitAllocator:
    """Chooses a scheme for every linear of a model, as soon as it can.

    With a file of an allocation or of sensitivities that is at once; otherwise :meth:`measure`
    comes first, and everything that needs the choice raises until then.

    Args:
        request: what was asked for.
        choices: the linears and their options.
    """

    def __init__(self, request: AllocationRequest, choices: Choices) -> None:
        self._request, self._choices = request, choices
        self._decision: Decision | None = None

    @classmethod
    def of(
        cls,
        request: AllocationRequest,
        model: nn.Module,
        layers: list[MoELayer],
        *,
        targets: Iterable[str],
        ignore: Iterable[str],
        weight_observer: str | None,
    ) -> BitAllocator:
        """Check a request against a model, and decide if it names a file to decide by.

        Args:
            request: what was asked for.
            model: the linearized model.
            layers: its MoE layers.
            targets: as for quantization.
            ignore: as for quantization.
            weight_observer: as for quantization.

        Raises:
            ValueError: if a target or an option cannot be what was meant, no choice of options
                meets the budget, or a file is of other linears or options.
        """
        choices = Choices.of(
            model,
            layers,
            options=request.options,
            targets=targets,
            ignore=ignore,
            weight_observer=weight_observer,
        )
        allocator = cls(request, choices)
        if request.allocation is not None:  # it met its own budget, and none is asked for here
            allocator._use(Allocation.load(request.allocation))
            return allocator
        allocator._check_budget()
        if isinstance(request.sensitivity, str):
            allocator._solve(SensitivityTable.load(request.sensitivity))
        return allocator

    @property
    def is_decided(self) -> bool:
        """Tell whether every linear has an option; if not, :meth:`measure` comes next."""
        return self._decision is not None

    @property
    def decision(self) -> Decision:
        """Return the choice.

        Raises:
            RuntimeError: before sensitivities are known.
        """
        if self._decision is None:
            raise RuntimeError("no bits are allocated yet: sensitivities have to be measured first")
        return self._decision

    @property
    def allocation(self) -> Allocation:
        """Return the choice by name; raises as :attr:`decision` does."""
        return self.decision.allocation

    def measure(
        self, modifier: SensitivityModifier, state: State, kept: KeptMeasurements | None
    ) -> None:
        """Measure sensitivities on the calibration data and choose.

        Args:
            modifier: what measures, rounding as the result will be rounded.
            state: the host's.
            kept: where what is measured is kept, and found if it was.
        """
        # files appear whole: one that is there is a table that was finished, of this very run
        if kept is not None and kept.table.is_there():
            self._solve(SensitivityTable.load(kept.table.path))
            return
        table = measure_sensitivity(modifier, state, kept)
        if kept is not None and is_source_process():
            kept.table.write(table.save)
        self._solve(table)

    def config_groups(self) -> tuple[dict[str, QuantizationScheme], list[str]]:
        """Return the host's ``config_groups`` and what goes into ``ignore``."""
        return self.decision.config_groups()

    def codebooks(self) -> dict[str, CodebookFormat]:
        """Return the format of every linear that gets a codebook, by name."""
        return self.decision.codebooks()

    def check_no_codebooks(self) -> None:
        """Refuse codebooks where weights are rounded to grids only.

        Raises:
            ValueError: naming the options.
        """
        options = {option.name: option for option in self._choices.options}
        if self._decision is not None:
            options |= self._decision.options
        wrong = [name for name, option in options.items() if option.codebook is not None]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: codebooks are made by RWKVQuantModifier; MoEQuantModifier "
                "rounds to grids, which servers read"
            )

    def check_attached(self) -> None:
        """Make sure that every linear carries the scheme that was chosen for it."""
        self.decision.check_attached()

    def save(self, directory: Path) -> None:
        """Write table and allocation beside a checkpoint."""
        self.decision.save(directory)

    def _check_budget(self) -> None:
        """Refuse a budget that no choice of options can meet, before anything is measured.

        Raises:
            InfeasibleBudgetError: naming the range that can be met.
        """
        self._choices.check_fit()
        # at no loss only bytes decide: if even this cannot be solved, no measured table can
        free = np.where(self._choices.fits(), 0.0, np.inf)[None]
        table = self._choices.table(free, domains=("none",))
        allocate_bits(table, self._request.budget, target=self._request.target)

    def _solve(self, table: SensitivityTable) -> None:
        """Choose, with a floor for linears whose fate is their own.

        Raises:
            ValueError: if the table is of other linears or options.
        """
        options = [option.name for option in self._choices.options]
        if set(table.options) - set(options):
            raise ValueError(
                f"the table was measured for the options {list(table.options)}, asked for are "
                f"{options}"
            )
        target = self._request.target
        # where experts share a scheme, one that saw few tokens is judged together with the others
        is_free = target in {Target.EXPERT, Target.LINEAR}
        allocation = allocate_bits(
            table.floored() if is_free else table,
            self._request.budget,
            target=target,
            robust=self._request.robust,
        )
        self._use(allocation, table)

    def _use(self, allocation: Allocation, table: SensitivityTable | None = None) -> None:
        target = self._request.target
        self._decision = Decision.of(self._choices, target, allocation, table)
        counts = Counter(allocation.choice.values())
        logger.info(
            f"{allocation.bits_per_weight:.4f} bits per weight for {counts.total()} linears, "
            f"{', '.join(f'{n} {option}' for option, n in sorted(counts.items()))}; predicted "
            f"loss {allocation.value:.4g}, {100 * allocation.gap:.2g} % above the bound"
        )
