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
_OFF_CENTRE = (0.6, 0.2)  # steps of the grid, and of their spread; weights have a mean near zero
_MIN_ROWS, _MIN_WEIGHTS = 16, 1024  # for such a mean to say anything


class _Counts:
    """What is known of a weight's codes after some of its rows."""

    def __init__(self, num_bits: int) -> None:
        self.highest = (1 << num_bits) - 1
        self.low, self.high, self.at_limit = self.highest, 0, 0
        self.sum = self.squares = 0.0
        self.rows: list[torch.Tensor] = []  # the largest weight of each row
        self.columns: torch.Tensor | None = None  # the largest code, whatever its scale

    def add(self, block: Block) -> None:
        codes = block.codes
        low, high = (int(extreme) for extreme in codes.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.at_limit += int(((codes == 0) | (codes == self.highest)).sum())
        centred = (codes - block.zero_point[:, block.group]).float()
        self.sum += float(centred.sum())
        self.squares += float(centred.square().sum())
        sizes = (centred * block.scale[:, block.group]).abs()
        self.rows.append(sizes.amax(1))
        columns = centred.abs().amax(0)
        self.columns = columns if self.columns is None else torch.maximum(self.columns, columns)


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
    mean, spread = counts.sum / size, (counts.squares / size) ** 0.5
    is_enough = linear.shape[0] >= _MIN_ROWS and size >= _MIN_WEIGHTS and scheme.num_bits > 1
    if is_enough and abs(mean) > max(_OFF_CENTRE[0], _OFF_CENTRE[1] * spread):
        what = f"codes are {mean:+.2f} steps off their zero points in the mean, spread {spread:.2g}"
        yield error("zero-point", where, what)
