"""From a budget to schemes on modules: measure, solve, and say it in the host's config groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from compressed_tensors.quantization import QuantizationScheme
from llmcompressor.core import State
from loguru import logger
from torch import nn

from moeq_plugin.core.allocation import Allocation, BitBudget, allocate_bits
from moeq_plugin.core.sensitivity import SensitivityTable
from moeq_plugin.integrations.llm_compressor.allocation.options import (
    UNQUANTIZED,
    Option,
    parse_option,
)
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity import SensitivityModifier
from moeq_plugin.integrations.llm_compressor.allocation.target_linears import check_fit, other_bytes
from moeq_plugin.integrations.llm_compressor.allocation.target_patterns import patterns
from moeq_plugin.integrations.llm_compressor.host import run_pass
from moeq_plugin.integrations.llm_compressor.schemes import describe, weight_args
from moeq_plugin.models.moe import MoELayer
from moeq_plugin.models.scheme_units import Target, unit_labels

TABLE_FILE = "moeq_sensitivity.json"
ALLOCATION_FILE = "moeq_allocation.json"


class BitAllocator:
    """Chooses a scheme for every linear of a model.

    Args:
        model: the linearized model.
        layers: its MoE layers.
        names: the linears to decide about, and their names.
        options: what there is to choose from.
        target: what will read the checkpoint.

    Attributes:
        table: the sensitivities, once known.
        allocation: the choice, once made.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[MoELayer],
        names: Mapping[nn.Linear, str],
        options: Iterable[Option],
        target: Target,
    ) -> None:
        self._names, self._target = dict(names), target
        self._options = {option.name: option for option in options}
        self._units = unit_labels(list(names.values()), layers, dict(model.named_modules()))
        self._fixed_bytes = other_bytes(model, names)
        self.table: SensitivityTable | None = None
        self.allocation: Allocation | None = None

    @classmethod
    def of(cls, request, model, layers, *, targets, ignore, weight_observer):
        from moeq_plugin.integrations.llm_compressor.allocation.options import parse_options
        from moeq_plugin.integrations.llm_compressor.allocation.target_linears import target_linears

        self = cls(
            model,
            layers,
            target_linears(model, layers, targets, ignore),
            parse_options(request.options, weight_observer),
            request.target,
        )
        self._request = request
        if request.allocation is not None:
            self.use(Allocation.load(request.allocation))
            return self
        self.check_budget(request.budget)
        if isinstance(request.sensitivity, str):
            self.solve(
                SensitivityTable.load(request.sensitivity), request.budget, robust=request.robust
            )
        return self

    @property
    def is_decided(self):
        return self.allocation is not None

    def measure(self, modifier, state, kept):
        from compressed_tensors.distributed import is_source_process

        from moeq_plugin.files.atomic import write_whole

        if kept is not None and kept.exists():
            table = SensitivityTable.load(kept)
        else:
            table = measure_sensitivity(modifier, state)
            if kept is not None and is_source_process():
                write_whole(kept, table.save)
        self.solve(table, self._request.budget, robust=self._request.robust)

    def check_budget(self, budget: BitBudget) -> None:
        """Refuse a budget that no choice of options can meet, before anything is measured.

        Raises:
            InfeasibleBudgetError: naming the range that can be met.
        """
        options = self._options.values()
        check_fit(self._names, options)
        fits = np.array([[option.fits(m) for option in options] for m in self._names])
        table = SensitivityTable(
            rows=tuple(self._names.values()),
            options=tuple(self._options),
            domains=("none",),
            loss=np.where(fits, 0.0, np.inf)[None],
            num_bytes=np.array([[o.num_bytes(m) for o in options] for m in self._names]),
            num_weights=np.array([m.weight.numel() for m in self._names]),
            units=self._units,
            fixed_bytes=self._fixed_bytes,
        )
        allocate_bits(table, budget, target=self._target)

    def solve(self, table: SensitivityTable, budget: BitBudget, *, robust: bool) -> None:
        """Choose, with a floor for rows whose fate is their own, and log what came out.

        Raises:
            ValueError: if the table is of other linears or options.
        """
        if set(table.options) - set(self._options):
            raise ValueError(
                f"the table was measured for the options {list(table.options)}, asked for are "
                f"{list(self._options)}"
            )
        self.table = table
        is_free = self._target in {Target.EXPERT, Target.LINEAR}
        self.use(
            allocate_bits(
                table.floored() if is_free else table, budget, target=self._target, robust=robust
            )
        )

    def use(self, allocation: Allocation) -> None:
        """Take an allocation that was made before.

        Raises:
            ValueError: naming linears without an option, options without a linear, unknown
                options, and units of the target whose members differ.
        """
        rows, choice = list(self._names.values()), allocation.choice
        missing = [name for name in rows if name not in choice]
        extra = sorted(set(choice) - set(rows))
        if missing or extra:
            raise ValueError(
                f"the allocation is for another model or other targets: {len(missing)} linears "
                f"have no option ({', '.join(missing[:5])}) and {len(extra)} options no linear "
                f"({', '.join(extra[:5])})"
            )
        for option in set(choice.values()) - set(self._options):
            self._options[option] = parse_option(option)
        members: dict[str, dict[str, list[str]]] = {}
        for name, unit in zip(rows, self._units[self._target], strict=True):
            members.setdefault(unit, {}).setdefault(choice[name], []).append(name)
        mixed = {unit: options for unit, options in members.items() if len(options) > 1}
        if mixed:
            lines = [
                f"  - {unit}: " + ", ".join(f"{option} for {_some(n)}" for option, n in of.items())
                for unit, of in mixed.items()
            ]
            raise ValueError(
                f"target {self._target.value!r} reads one scheme for all linears of a unit, and "
                "this allocation mixes them. Allocate for this target, or name another one:\n"
                + "\n".join(lines[:10])
            )
        self.allocation = allocation
        counts = Counter(choice.values())
        logger.info(
            f"{allocation.bits_per_weight:.4f} bits per weight for {len(choice)} linears, "
            f"{', '.join(f'{n} {option}' for option, n in sorted(counts.items()))}; predicted "
            f"loss {allocation.value:.4g}, {100 * allocation.gap:.2g} % above the bound"
        )

    def config_groups(self) -> tuple[dict[str, QuantizationScheme], list[str]]:
        """Return the host's ``config_groups`` and what goes into ``ignore``.

        Targets are regular expressions that match the names of modules here and the names that
        vLLM gives them; no two match one name.
        """
        assert self.allocation is not None  # solve or use comes first
        rows: dict[str, list[str]] = {}
        for name, option in self.allocation.choice.items():
            rows.setdefault(option, []).append(name)
        targets = patterns(rows)
        groups = {
            name: option.for_targets(targets[name])
            for name, option in self._options.items()
            if name in rows and option.scheme is not None
        }
        return groups, rows.get(UNQUANTIZED, [])

    def check_attached(self) -> None:
        """Make sure that every linear carries the scheme that was chosen for it.

        Raises:
            RuntimeError: naming the first that does not.
        """
        assert self.allocation is not None
        for linear, name in self._names.items():
            option = self._options[self.allocation.choice[name]]
            args = weight_args(linear)
            found = describe(args) if args is not None else UNQUANTIZED
            if found != option.describe():
                raise RuntimeError(f"{name} was to get {option.describe()} and carries {found}")

    def save(self, directory: Path) -> None:
        """Write table and allocation beside a checkpoint."""
        if self.table is not None:
            self.table.save(directory / TABLE_FILE)
        if self.allocation is not None:
            self.allocation.save(directory / ALLOCATION_FILE)


def measure_sensitivity(modifier: SensitivityModifier, state: State) -> SensitivityTable:
    """Run ``modifier`` through the calibration data, inside a oneshot that does something else."""
    modifier.initialize(state)
    run_pass(modifier, state, state.data.calib, propagate_error=False)  # there is none
    modifier.finalize(state)
    return modifier.table


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
