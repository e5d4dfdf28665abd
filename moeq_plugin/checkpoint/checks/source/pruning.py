"""Which expert of the source did pruning leave under which number?"""

from __future__ import annotations

import torch

from moeq_plugin.checkpoint.architecture import Linear, Role
from moeq_plugin.checkpoint.checks.source.originals import Originals
from moeq_plugin.checkpoint.checks.source.stored_weights import first_rows
from moeq_plugin.checkpoint.checks.values.readable import is_readable
from moeq_plugin.checkpoint.layout import Layout

_ROWS = 4  # tell experts apart


def nearest_expert(layout: Layout, linear: Linear, originals: Originals) -> int | None:
    """Return the source's expert whose weight this is, as far as its first rows tell."""
    rows = first_rows(layout, linear, _ROWS).flatten()
    best, nearest = 0.5, None
    for expert in range(originals.source.architecture.num_experts):
        for original in originals.candidates(linear, expert):
            cosine = torch.cosine_similarity(rows, original[:_ROWS].flatten(), dim=0)
            if float(cosine) > best:
                best, nearest = float(cosine), expert
    return nearest


def kept_experts(layout: Layout, originals: Originals) -> dict[tuple[int | None, int], int]:
    """Return for (layer, expert) of a pruned checkpoint the number that it has in the source."""
    kept: dict[tuple[int | None, int], int] = {}
    for linear in layout.present(Role.EXPERT):
        if linear.expert is None or not linear.name.endswith("gate_proj"):
            continue
        if is_readable(layout, linear):
            nearest = nearest_expert(layout, linear, originals)
            if nearest is not None:
                kept[linear.layer, linear.expert] = nearest
    return kept
