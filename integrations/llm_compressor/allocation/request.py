"""What a recipe says of a budget: the question that a bit allocation answers."""

from __future__ import annotations

from dataclasses import dataclass

from moeq_plugin.core.allocation import BitBudget
from moeq_plugin.integrations.llm_compressor.allocation.sensitivity_config import SensitivityConfig
from moeq_plugin.models.scheme_units import Target


@dataclass(frozen=True)
class AllocationRequest:
    """The fields of a recipe that take the place of a scheme.

    Attributes:
        bits_per_weight: what all tensors stored for the targeted linears may take per weight.
        size_gb: what all tensors of the checkpoint may take, in 1e9 bytes.
        options: names of the schemes to choose from.
        target: what will read the checkpoint, which decides what has to share a scheme.
        robust: minimise the loss of the worst domain relative to uniform bits, not the mean.
        sensitivity: how to measure, or the file of a table measured before.
        allocation: the file of an allocation made before, to be applied as it is.
    """

    bits_per_weight: float | None
    size_gb: float | None
    options: tuple[str, ...]
    target: Target
    robust: bool
    sensitivity: SensitivityConfig | str
    allocation: str | None

    @property
    def is_asked(self) -> bool:
        """Tell whether there is anything to allocate; a recipe may name a scheme instead."""
        return any(value is not None for value in self._ways().values())

    @property
    def budget(self) -> BitBudget:
        """Return the budget.

        Raises:
            ValueError: if there is none or more than one, or it is not positive and finite.
        """
        return BitBudget(bits_per_weight=self.bits_per_weight, size_gb=self.size_gb)

    def check_alone(self, scheme: object, config_groups: object) -> None:
        """Refuse a recipe that says in two ways what the result is to be.

        Args:
            scheme: the recipe's, ``None`` if it has none.
            config_groups: likewise.

        Raises:
            ValueError: naming the fields, if an allocation and something beside it is asked for.
        """
        ways = {**self._ways(), "scheme": scheme, "config_groups": config_groups}
        asked = [name for name, value in ways.items() if value is not None]
        if self.is_asked and len(asked) > 1:
            raise ValueError(f"give exactly one of {', '.join(ways)}, got {' and '.join(asked)}")

    def _ways(self) -> dict[str, object]:
        return {
            "bits_per_weight": self.bits_per_weight,
            "size_gb": self.size_gb,
            "allocation": self.allocation,
        }
