"""The half of MoEQuantModifier that turns a budget into schemes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressed_tensors.distributed import is_source_process
from llmcompressor.core import State
from llmcompressor.modifiers.gptq import GPTQModifier
from pydantic import Field, PrivateAttr
from torch import nn

from moeq_plugin.core.allocation import Allocation, BitBudget
from moeq_plugin.core.sensitivity import SensitivityTable
from moeq_plugin.files.atomic import write_whole
from moeq_plugin.integrations.llm_compressor.allocation.allocator import (
    BitAllocator,
    measure_sensitivity,
)
from moeq_plugin.integrations.llm_compressor.allocation.options import (
    DEFAULT_OPTIONS,
    parse_options,
)
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity import (
    SensitivityConfig,
    SensitivityModifier,
)
from moeq_plugin.integrations.llm_compressor.allocation.target_linears import target_linears
from moeq_plugin.models.moe import MoELayer
from moeq_plugin.models.units import Target


class AllocatingModifier(GPTQModifier):
    """Quantizes to schemes that it chooses itself, where it is given a budget.

    Args:
        bits_per_weight: instead of a scheme, what all tensors stored for the targeted linears may
            take per weight; every unit of the target gets the option that makes the predicted
            loss least.
        size_gb: likewise, what all tensors of the checkpoint may take, in 1e9 bytes.
        options: schemes to choose from, such as ``W4A16``, ``W3A16_G64`` or ``UNQUANTIZED``.
        target: what will read the checkpoint (:class:`moeq_plugin.models.units.Target`), which
            decides what has to share a scheme.
        robust: minimise the loss of the worst domain relative to uniform bits, not the mean.
        sensitivity: how to measure (:class:`SensitivityConfig`), or the file of a table measured
            before.
        allocation: the file of an allocation made before, to be applied as it is.
    """

    bits_per_weight: float | None = None
    size_gb: float | None = None
    options: list[str] = Field(default_factory=lambda: list(DEFAULT_OPTIONS))
    target: Target = Target.VLLM
    robust: bool = False
    sensitivity: SensitivityConfig | str = Field(default_factory=SensitivityConfig)
    allocation: str | None = None

    _allocator: BitAllocator | None = PrivateAttr(default=None)

    def model_dump(self, **kwargs: Any) -> dict[str, Any]:
        """Return plain data: the host writes ``recipe.yaml`` from it and could not read enums."""
        kwargs.setdefault("mode", "json")
        dumped = super().model_dump(**kwargs)
        if self._allocator is not None:
            dumped["config_groups"] = None  # what was asked for is the budget
        return dumped

    def prepare_allocation(self, model: nn.Module, layers: list[MoELayer]) -> bool:
        """Check a wish for an allocation; return whether there is one.

        Raises:
            ValueError: if the budget cannot be met, or is not all that was asked for.
        """
        names = ("bits_per_weight", "size_gb", "allocation", "scheme", "config_groups")
        asked = [name for name in names if getattr(self, name) is not None]
        if not {"bits_per_weight", "size_gb", "allocation"} & set(asked):
            return False
        if len(asked) > 1:
            raise ValueError(f"give exactly one of {', '.join(names)}, got {' and '.join(asked)}")
        linears = target_linears(model, layers, self.targets, self.ignore)
        options = parse_options(self.options, self.weight_observer)
        self._allocator = BitAllocator(model, layers, linears, options, self.target)
        if self.allocation is not None:
            self._allocator.use(Allocation.load(self.allocation))
            return True
        self._allocator.check_budget(self._budget())
        if isinstance(self.sensitivity, str):
            self._solve(SensitivityTable.load(self.sensitivity))
        return True

    @property
    def awaits_allocation(self) -> bool:
        """Tell whether schemes can be attached only once sensitivities have been measured."""
        return self._allocator is not None and self._allocator.allocation is None

    def measure_and_allocate(self, state: State, kept: Path | None = None) -> None:
        """Measure sensitivities on the calibration data and choose.

        Args:
            state: of the host.
            kept: where the table is kept once it has been measured, and found if it was.
        """
        assert isinstance(self.sensitivity, SensitivityConfig)  # a file was read before
        if kept is not None and kept.exists():
            self._solve(SensitivityTable.load(kept))
            return
        table = measure_sensitivity(self.sensitivity_modifier(self.sensitivity), state)
        if kept is not None and is_source_process():
            write_whole(kept, table.save)
        self._solve(table)

    def sensitivity_modifier(self, config: SensitivityConfig) -> SensitivityModifier:
        """Return what measures for this modifier, rounding as it does."""
        raise NotImplementedError

    def adopt_allocation(self) -> None:
        """Take the chosen schemes for ``config_groups``, and 16 bits for ``ignore``."""
        if self._allocator is None:
            return
        self.config_groups, unquantized = self._allocator.config_groups()
        self.ignore = [*self.ignore, *(name for name in unquantized if name not in self.ignore)]
        self._resolved_config = None

    def check_attached(self) -> None:
        """Make sure that every linear carries the scheme that was chosen for it."""
        if self._allocator is not None:
            self._allocator.check_attached()

    def save_allocation(self, directory: Path) -> None:
        """Write table and allocation beside a checkpoint, if there are any."""
        if self._allocator is not None:
            self._allocator.save(directory)

    def _budget(self) -> BitBudget:
        return BitBudget(bits_per_weight=self.bits_per_weight, size_gb=self.size_gb)

    def _solve(self, table: SensitivityTable) -> None:
        assert self._allocator is not None
        self._allocator.solve(table, self._budget(), robust=self.robust)
