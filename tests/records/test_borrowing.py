"""How many linears borrow, and when that is too many."""

import pytest

from moeq_plugin.records.borrowing import Borrowing
from moeq_plugin.records.run import Basis, LinearRecord

EXPERT = "model.layers.0.mlp.experts.{}.down_proj"
ATTENTION = "model.layers.{}.self_attn.q_proj"


def linears(name, *bases):
    return [LinearRecord(name.format(n), "W4", basis, 1.0, 0.0) for n, basis in enumerate(bases)]


OWN, FEW, SHRUNK = Basis.OWN, Basis.FEW, Basis.SHRUNK


@pytest.mark.parametrize(
    ("found", "expected"),
    [  # notable, too much, none is fed
        ([], (False, False, False)),
        (linears(EXPERT, *[OWN] * 19, SHRUNK), (False, False, False)),
        (linears(EXPERT, *[OWN] * 18, SHRUNK), (True, False, False)),
        (linears(EXPERT, OWN, SHRUNK), (True, False, False)),
        (linears(EXPERT, OWN, SHRUNK, Basis.NONE), (True, True, False)),
        (linears(ATTENTION, FEW, FEW), (True, True, True)),
        (linears(ATTENTION, OWN, FEW), (True, False, False)),
        (linears(ATTENTION, OWN, OWN, OWN) + linears(EXPERT, SHRUNK), (True, False, True)),
    ],
)
def test_when_it_is_too_many(found, expected):
    borrowing = Borrowing.of(found)
    assert (borrowing.is_notable, borrowing.is_too_much, borrowing.none_is_fed) == expected
    assert borrowing.num_borrow == sum(linear.basis is not OWN for linear in found)
