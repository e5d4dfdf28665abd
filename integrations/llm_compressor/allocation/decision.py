"""An allocation on the linears of a model, said in the host's config groups and checked there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from compressed_tensors.quantization import QuantizationScheme
from torch import nn

from moeq_plugin.core.allocation import Allocation
from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.core.sensitivity import SensitivityTable
from moeq_plugin.integrations.llm_compressor.allocation.choices import Choices
from moeq_plugin.integrations.llm_compressor.allocation.options import (
    UNQUANTIZED,
    Option,
    parse_option,
)
from moeq_plugin.integrations.llm_compressor.allocation.target_patterns import patterns
from moeq_plugin.integrations.llm_compressor.schemes import describe, weight_args
from moeq_plugin.models.scheme_units import Target

TABLE_FILE = "moeq_sensitivity.json"
ALLOCATION_FILE = "moeq_allocation.json"


@dataclass(frozen=True)
class Decision:
    """An option for every linear.

    Attributes:
        names: the linears and their names.
        options: those that occur in the allocation, by name and in the order of their groups.
        allocation: which linear gets which.
        table: what it was made from, ``None`` if it was made elsewhere.
    """

    names: Mapping[nn.Linear, str]
    options: Mapping[str, Option]
    allocation: Allocation
    table: SensitivityTable | None

    @classmethod
    def of(
        cls,
        choices: Choices,
        target: Target,
        allocation: Allocation,
        table: SensitivityTable | None,
    ) -> Decision:
        """Look up an allocation's names in a model.

        Args:
            choices: the linears, and the options that were asked for; an allocation made
                elsewhere may have others.
            target: what will read the checkpoint.
            allocation: which linear gets which option, by name.
            table: what it was made from, ``None`` if it was made elsewhere.

        Raises:
            ValueError: naming linears without an option, options without a linear, unknown
                options, and units of the target whose members differ.
        """
        _check_names(choices, allocation)
        options = {option.name: option for option in choices.options}
        chosen = set(allocation.choice.values())
        # of an allocation made elsewhere; the recipe's own come first, with its observer
        options |= {name: parse_option(name) for name in sorted(chosen - options.keys())}
        _check_units(choices, target, allocation)
        options = {name: option for name, option in options.items() if name in chosen}
        return cls(choices.names, options, allocation, table)

    def config_groups(self) -> tuple[dict[str, QuantizationScheme], list[str]]:
        """Return the host's ``config_groups`` and what goes into ``ignore``.

        Targets are regular expressions that match the names of modules here and the names that
        vLLM gives them; no two match one name.
        """
        members: dict[str, list[str]] = {}
        for name, option in self.allocation.choice.items():
            members.setdefault(option, []).append(name)
        targets = patterns(members)
        groups = {
            name: option.for_targets(targets[name])
            for name, option in self.options.items()
            if option.scheme is not None
        }
        return groups, members.get(UNQUANTIZED, [])

    def codebooks(self) -> dict[str, CodebookFormat]:
        """Return the format of every linear that gets a codebook, by name."""
        chosen = {name: self.options[option] for name, option in self.allocation.choice.items()}
        return {n: option.codebook for n, option in chosen.items() if option.codebook is not None}

    def check_attached(self) -> None:
        """Make sure that every linear carries the scheme that was chosen for it.

        Raises:
            RuntimeError: naming the first that does not.
        """
        for linear, name in self.names.items():
            option = self.options[self.allocation.choice[name]]
            args = weight_args(linear)
            found = describe(args) if args is not None else UNQUANTIZED
            wanted = option.describe() if option.scheme is not None else UNQUANTIZED
            if found != wanted:  # a codebook carries none: its weight is encoded by its own phase
                raise RuntimeError(f"{name} was to get {wanted} and carries {found}")

    def save(self, directory: Path) -> None:
        """Write table and allocation beside a checkpoint."""
        if self.table is not None:
            self.table.save(directory / TABLE_FILE)
        self.allocation.save(directory / ALLOCATION_FILE)


def _check_names(choices: Choices, allocation: Allocation) -> None:
    names, choice = list(choices.names.values()), allocation.choice
    missing = [name for name in names if name not in choice]
    extra = sorted(set(choice) - set(names))
    if missing or extra:
        raise ValueError(
            f"the allocation is for another model or other targets: {len(missing)} linears "
            f"have no option ({', '.join(missing[:5])}) and {len(extra)} options no linear "
            f"({', '.join(extra[:5])})"
        )


def _check_units(choices: Choices, target: Target, allocation: Allocation) -> None:
    members: dict[str, dict[str, list[str]]] = {}  # unit -> option -> names
    for name, unit in zip(choices.names.values(), choices.units[target], strict=True):
        members.setdefault(unit, {}).setdefault(allocation.choice[name], []).append(name)
    mixed = {unit: options for unit, options in members.items() if len(options) > 1}
    if mixed:
        lines = [
            f"  - {unit}: " + ", ".join(f"{option} for {_some(n)}" for option, n in of.items())
            for unit, of in mixed.items()
        ]
        raise ValueError(
            f"target {target.value!r} reads one scheme for all linears of a unit, and this "
            "allocation mixes them. Allocate for this target, or name another one:\n"
            + "\n".join(lines[:10])
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
