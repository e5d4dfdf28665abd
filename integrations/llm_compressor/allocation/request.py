"""temporary"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeq_plugin.core.allocation import BitBudget


@dataclass(frozen=True)
class AllocationRequest:
    bits_per_weight: float | None
    size_gb: float | None
    options: tuple[str, ...]
    target: Any
    robust: bool
    sensitivity: Any
    allocation: str | None

    @property
    def is_asked(self):
        return not (
            self.bits_per_weight is None and self.size_gb is None and self.allocation is None
        )

    @property
    def budget(self):
        return BitBudget(bits_per_weight=self.bits_per_weight, size_gb=self.size_gb)

    def check_alone(self, scheme, config_groups):
        names = {
            "bits_per_weight": self.bits_per_weight,
            "size_gb": self.size_gb,
            "allocation": self.allocation,
            "scheme": scheme,
            "config_groups": config_groups,
        }
        asked = [n for n, v in names.items() if v is not None]
        if len(asked) > 1:
            raise ValueError(f"give exactly one of {', '.join(names)}, got {' and '.join(asked)}")
