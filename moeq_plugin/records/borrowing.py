"""How many linears rest on too few tokens of their own, and when that is too many.

One rule for the closing lines of a run, its exit code and the decision of the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeq_plugin.core.names import place
from moeq_plugin.records.run import Basis, LinearRecord

_FEW, _MANY = 0.05, 0.5


@dataclass(frozen=True)
class Borrowing:
    """The linears of a run that do not rest on enough tokens of their own.

    Attributes:
        num_linears: all of them.
        num_borrow: that rest on tokens of others, on too few of their own, or on none.
        none_is_fed: whether no expert has enough tokens of its own; without experts, no linear.
    """

    num_linears: int
    num_borrow: int
    none_is_fed: bool

    @classmethod
    def of(cls, linears: Sequence[LinearRecord]) -> Borrowing:
        """Count them in the records of a run."""
        starved = [linear for linear in linears if linear.basis is not Basis.OWN]
        judged = [linear for linear in linears if place(linear.name).expert is not None] or linears
        none_is_fed = bool(judged) and all(linear.basis is not Basis.OWN for linear in judged)
        return cls(len(linears), len(starved), none_is_fed)

    @property
    def share(self) -> float:
        """Return the share of the linears that borrow."""
        return self.num_borrow / self.num_linears if self.num_linears else 0.0

    @property
    def is_notable(self) -> bool:
        """Tell whether so many borrow that somebody should look."""
        return self.share > _FEW

    @property
    def is_too_much(self) -> bool:
        """Tell whether so many borrow that the checkpoint should not be shipped."""
        return self.share > _MANY

    def sentence(self) -> str:
        """Return what there is to say of it, and the way out."""
        return (
            f"{self.num_borrow} of {self.num_linears} linears ({100 * self.share:.1f} %) rest on "
            "tokens of others or on too few of their own: calibrate on more text."
        )
