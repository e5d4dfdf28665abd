"""Are the numbers of a checkpoint sane, as far as one can tell without its source?"""

from __future__ import annotations

from collections.abc import Iterator

from moeq_plugin.checkpoint.checks.findings import Finding
from moeq_plugin.checkpoint.checks.values.code_statistics import check_codes
from moeq_plugin.checkpoint.checks.values.copies import check_copies
from moeq_plugin.checkpoint.checks.values.floats import check_floats
from moeq_plugin.checkpoint.checks.values.gptq_tensors import check_gptq_tensors
from moeq_plugin.checkpoint.checks.values.readable import is_readable
from moeq_plugin.checkpoint.checks.values.routers import check_routers
from moeq_plugin.checkpoint.checks.values.scales import (
    OF_WEIGHTS,
    SCALE_DTYPES,
    SCALES,
    check_scales,
    unsigned_scales,
)
from moeq_plugin.checkpoint.codes import can_read
from moeq_plugin.checkpoint.formats import FLOATS
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.checkpoint.schemes import GPTQ_FORMS


def check_values(layout: Layout) -> Iterator[Finding]:
    """Yield what is wrong with numbers; reads the whole checkpoint, one tensor at a time."""
    unsigned = unsigned_scales(layout)
    for tensor in layout.checkpoint.tensors.values():
        if not can_read(tensor):
            continue
        suffix = tensor.name.rpartition(".")[2]
        if suffix in SCALES:
            if tensor.dtype in SCALE_DTYPES:
                may_be_signed = suffix in OF_WEIGHTS and tensor.name not in unsigned
                yield from check_scales(tensor, may_be_signed=may_be_signed)
        elif tensor.dtype in {*FLOATS, "F64"}:
            yield from check_floats(tensor, layout.architecture.family)
    for linear in layout.present():
        scheme = layout.stored[linear.name]
        if scheme and not scheme.is_float and is_readable(layout, linear):
            if scheme.form in GPTQ_FORMS:
                yield from check_gptq_tensors(layout, linear, scheme)
            yield from check_codes(layout, linear, scheme)
    yield from check_routers(layout)
    yield from check_copies(layout)
