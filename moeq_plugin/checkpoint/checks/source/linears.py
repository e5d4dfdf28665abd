"""Compare each linear with what the source has in its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeq_plugin.checkpoint.architecture import Linear, Role
from moeq_plugin.checkpoint.checks.source import rescaled, rotated
from moeq_plugin.checkpoint.checks.source.judgement import damage, is_unrelated, loss_of_all
from moeq_plugin.checkpoint.checks.source.originals import Originals, plain_name
from moeq_plugin.checkpoint.checks.source.recipe import Rewrites
from moeq_plugin.checkpoint.checks.source.rounding import Rounding
from moeq_plugin.checkpoint.checks.source.same import unequal
from moeq_plugin.checkpoint.checks.source.stored_weights import rounding_of, stored_weight
from moeq_plugin.checkpoint.layout import Layout

_16_BIT_STEP = 2**-6  # of weights that were rescaled and rounded again


@dataclass(frozen=True)
class Verdict:
    """What was found out about a linear.

    Attributes:
        linear: which.
        what: is wrong with it; empty if nothing is.
        is_unrelated: whether it has nothing to do with the source's.
        is_known: whether the source has a weight of its name and shape.
    """

    linear: Linear
    what: str = ""
    is_unrelated: bool = False
    is_known: bool = True


def judge(layout: Layout, linear: Linear, originals: Originals, rewrites: Rewrites) -> Verdict:
    """Compare one readable linear with the source's."""
    first: Verdict | None = None
    for original in originals.candidates(linear):
        found = _compare(layout, linear, original, originals, rewrites)
        if not found.what:
            return found
        if first is None or (first.is_unrelated and not found.is_unrelated):
            first = found
    return first or Verdict(linear, is_known=False)


def _compare(
    layout: Layout, linear: Linear, original: torch.Tensor, originals: Originals, rewrites: Rewrites
) -> Verdict:
    if rewrites.corrected and layout.stored[linear.name] is not None:
        return _corrected(layout, linear, original, rewrites)
    if rewrites.rotated:
        what = _rotated(layout, linear, original, originals, rewrites)
        if what is not None:
            return Verdict(linear, what)
    if rewrites.rescaled and linear.role is not Role.HEAD:
        return _rescaled(layout, linear, original)
    if layout.stored[linear.name] is None:
        return Verdict(linear, _unequal(layout, linear, original, originals) or "")
    rounding = rounding_of(layout, linear, original)
    if rewrites.pruned_weights:
        what = "nothing is left of the source's" if is_unrelated(rounding) else None
    else:
        what = damage(rounding)
    return Verdict(linear, what or "", is_unrelated(rounding))


def _corrected(
    layout: Layout, linear: Linear, original: torch.Tensor, rewrites: Rewrites
) -> Verdict:
    """A linear of fine codes may make up for coarse ones by much more than a step of its grid."""
    if rewrites.rotated or rewrites.rescaled:
        return Verdict(linear)  # nothing is left that both would leave as it was
    rounding = rounding_of(layout, linear, original)
    return Verdict(linear, loss_of_all(rounding) or "", is_unrelated(rounding))


def _unequal(
    layout: Layout, linear: Linear, original: torch.Tensor, originals: Originals
) -> str | None:
    here = layout.modules[linear.name]["weight"]
    there = originals.modules.get(plain_name(linear.name), {}).get("weight", here)
    return unequal(stored_weight(layout, linear), original, {here.dtype, there.dtype})


def _rescaled(layout: Layout, linear: Linear, original: torch.Tensor) -> Verdict:
    weight = stored_weight(layout, linear)
    fitted = rescaled.fit(weight, original, linear)
    odd = rescaled.odd_factors(fitted)
    if odd:
        return Verdict(linear, odd)
    if layout.stored[linear.name] is None:
        apart = (weight - fitted.original).abs()
        row = fitted.original.abs().amax(1, keepdim=True)
        wrong = int((apart > _16_BIT_STEP * (fitted.original.abs() + 1e-2 * row)).any(1).sum())
        return Verdict(linear, f"{wrong} rows are not the source's, rescaled" if wrong else "")
    rounding = rounding_of(layout, linear, fitted.original)
    return Verdict(linear, damage(rounding, is_rescaled=True) or "", is_unrelated(rounding))


def _rotated(
    layout: Layout, linear: Linear, original: torch.Tensor, originals: Originals, rewrites: Rewrites
) -> str | None:
    """Return what is wrong, empty if nothing is, ``None`` if no rotation touches the linear."""
    weight = stored_weight(layout, linear)
    norm = rotated.reads_residual(linear)
    is_residual = rewrites.rotated == (rotated.RESIDUAL,)
    if norm is None and is_residual and not rotated.writes_residual(linear):
        return None
    if norm is not None:
        original = rotated.with_norm(original, originals.modules.get(norm, {}).get("weight"))
    grid = 0.0
    if layout.stored[linear.name] is not None:
        grid = _grid(rounding_of(layout, linear, weight))
    dim = (1 if norm is not None else 0) if is_residual and not rewrites.rescaled else None
    return rotated.other_lengths(weight, original, dim, grid) or ""


def _grid(rounding: Rounding) -> float:
    return float(rounding.whole().predicted())
