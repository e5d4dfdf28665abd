"""Do ``g_idx`` and ``qzeros`` of the GPTQ format say what its config says?"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moeq_plugin.checkpoint.architecture import Linear
from moeq_plugin.checkpoint.checks.findings import Finding, error
from moeq_plugin.checkpoint.codes import read_tensor
from moeq_plugin.checkpoint.formats import num_groups
from moeq_plugin.checkpoint.layout import Layout
from moeq_plugin.checkpoint.schemes import Scheme
from moeq_plugin.core.bit_packing import unpack_rows


def check_gptq_tensors(layout: Layout, linear: Linear, scheme: Scheme) -> Iterator[Finding]:
    """Yield what is wrong with the groups and zero points of a readable linear."""
    found = layout.modules[linear.name]
    if "g_idx" in found:
        groups = read_tensor(found["g_idx"]).long()
        what = _odd_groups(groups, scheme, layout.schemes.desc_act)
        if what:
            yield error("group-index", found["g_idx"].name, what)
    elif layout.schemes.desc_act and scheme.group_size:
        yield error("group-index", found["qweight"].name, "desc_act is true, and there is no g_idx")
    if scheme.symmetric:
        stored = unpack_rows(read_tensor(found["qzeros"]), scheme.num_bits, linear.shape[0])
        what = _odd_zero_points(stored, scheme)
        if what:
            yield error("zero-point", found["qzeros"].name, what)


def _odd_groups(groups: torch.Tensor, scheme: Scheme, act_order: bool) -> str | None:
    columns = len(groups)
    count = num_groups(scheme, columns)
    if int(groups.min()) < 0 or int(groups.max()) >= count:
        return f"entries outside of 0 to {count - 1}"
    in_order = torch.arange(columns) // (scheme.group_size or columns)
    if torch.equal(groups, in_order):
        return None
    if not act_order:
        return f"desc_act is false, so column i is in group i // {scheme.group_size or columns}"
    sizes, expected = (torch.bincount(g, minlength=count) for g in (groups, in_order))
    if not torch.equal(sizes, expected):
        return f"groups of {int(sizes.min())} to {int(sizes.max())} columns"
    return None


def _odd_zero_points(stored: torch.Tensor, scheme: Scheme) -> str | None:
    middle = 1 << (scheme.num_bits - 1)
    expected = middle - 1 if scheme.form == "gptq" else middle
    if bool((stored == expected).all()):
        return None
    other = 2 * middle - 1 - expected  # of the other version
    if bool((stored == other).all()):
        versions = ("2", "1") if scheme.form == "gptq" else ("1", "2")
        return (
            f"all are {other}: of version {versions[0]} of the format, checkpoint_format says "
            f"version {versions[1]}"
        )
    wrong = int((stored != expected).sum())
    return f"sym is true, but {wrong} of {stored.numel()} zero points are not {expected}"
