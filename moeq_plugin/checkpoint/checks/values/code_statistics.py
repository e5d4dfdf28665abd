"""Are the codes of a weight sane: not all alike, not at their limits, around their zero points?"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moeq_plugin.checkpoint.architecture import Linear
from moeq_plugin.checkpoint.checks.findings import Finding, error
from moeq_plugin.checkpoint.checks.values.floats import dead_share
from moeq_plugin.checkpoint.codes import Block, blocks, read_tensor
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.checkpoint.reader_names import in_file
from moeq_plugin.checkpoint.schemes import Scheme

# min-max rounding puts 1 of 16 codes at a limit; with few bits the limits are where most codes are
_SATURATED = {2: 0.95, 3: 0.8}
_OFF_CENTRE = (0.6, 0.2)  # steps of the grid, and of their spread; weights have a median near zero
_MIN_ROWS, _MIN_WEIGHTS = 16, 1024  # for such a median to say anything


class _Counts:
    """What is known of a weight's codes after some of its rows."""

    def __init__(self, num_bits: int) -> None:
        self.highest = (1 << num_bits) - 1
        self.low, self.high, self.at_limit = self.highest, 0, 0
        self.squares = 0.0
        self.share = 0.0  # of the codes that may be negative because the signs of scales are chosen
        # how often each code about its zero point is met
        self.often = torch.zeros(2 * self.highest + 1, dtype=torch.int64)
        self.rows: list[torch.Tensor] = []  # the largest weight of each row
        self.columns: torch.Tensor | None = None  # the largest code, whatever its scale

    def add(self, block: Block) -> None:
        codes = block.codes
        low, high = (int(extreme) for extreme in codes.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.at_limit += int(((codes == 0) | (codes == self.highest)).sum())
        about_zero = codes - block.zero_point[:, block.group]
        # zero points that are beyond all codes are as wrong as those at the limits
        numbers = about_zero.clamp(-self.highest, self.highest).flatten() + self.highest
        self.often += torch.bincount(numbers, minlength=len(self.often))
        if bool((block.scale < 0).any()):
            self.share = min(1.0, block.scale.shape[1] / codes.shape[1])
        centred = about_zero.float()
        self.squares += float(centred.square().sum())
        sizes = (centred * block.scale[:, block.group]).abs()
        self.rows.append(sizes.amax(1))
        columns = centred.abs().amax(0)
        self.columns = columns if self.columns is None else torch.maximum(self.columns, columns)

    def median(self) -> float:
        """Return how far the median code is off its zero point, in steps of the grid.

        Solvers that choose the signs of scales put the largest weight of each group on the negative
        side, where the grid reaches one step further. Without that as many codes would be negative
        as positive, so with it zero is between the median and a quantile half that share above.
        """
        low, high = self._quantile(0.5), self._quantile(0.5 + self.share / 2)
        return low if low > 0 else min(high, 0.0)

    def _quantile(self, share: float) -> float:
        """Return what a share of the codes is below, where a code stands for a whole step."""
        cumulated = self.often.double().cumsum(0)
        below = share * float(cumulated[-1])
        number = int(torch.searchsorted(cumulated, below))
        count = float(self.often[number])
        return number - self.highest - 0.5 + (below - float(cumulated[number]) + count) / count


def check_codes(layout: Layout, linear: Linear, scheme: Scheme) -> Iterator[Finding]:
    """Yield what is wrong with the codes of a readable linear in integers."""
    found = layout.modules[linear.name]
    where = in_file(linear.name, layout.architecture.family)
    if "weight_shape" in found:
        stated = read_tensor(found["weight_shape"]).tolist()
        if stated != list(linear.shape):
            name = found["weight_shape"].name
            yield error("wrong-shape", name, f"says {stated}, expected {list(linear.shape)}")
    counts = _Counts(scheme.num_bits)
    for block in blocks(found, scheme, linear.shape):
        counts.add(block)
    size = linear.shape[0] * linear.shape[1]
    share = counts.at_limit / size
    if not counts.squares:
        yield error("zeroed", where, "every code is the zero point: the weight is 0")
    elif counts.low == counts.high:
        yield error("constant", where, f"every code is {counts.low}")
    elif share > _SATURATED.get(scheme.num_bits, 0.5) and scheme.num_bits > 1:
        yield error("saturated", where, f"{share:.0%} of the codes are the lowest or the highest")
    else:
        yield from _uneven(where, linear, scheme, counts)


def _uneven(where: str, linear: Linear, scheme: Scheme, counts: _Counts) -> Iterator[Finding]:
    assert counts.columns is not None
    for name, sizes in (("rows", torch.cat(counts.rows)), ("columns", counts.columns)):
        what = dead_share(sizes, name)
        if what:
            yield error("dead-rows", where, what)
    size = linear.shape[0] * linear.shape[1]
    spread = (counts.squares / size) ** 0.5
    is_enough = linear.shape[0] >= _MIN_ROWS and size >= _MIN_WEIGHTS and scheme.num_bits > 1
    if is_enough and abs(counts.median()) > max(_OFF_CENTRE[0], _OFF_CENTRE[1] * spread):
        what = f"the median code is {counts.median():+.2f} steps off its zero point"
        what += f", spread {spread:.2g}"
        yield error("zero-point", where, what)
