"""Is what happened to a weight rounding? Limits that no sound quantizer was seen to reach.

Measured on 140 sound checkpoints of trained and random models: GPTQ, AWQ, MSE and min-max grids, 2
to 8 bits, groups of 16 to a whole row, experts that no token reaches, searched scales of both signs
and weights that were corrected for what was rounded before them, after 8 sequences or 64. Beside
each limit: the most that was seen. A slice's slope scatters with the rounding errors in it, so
limits are so many of its standard errors beyond what clipping may take from all weights alike.
"""

from __future__ import annotations

import torch

from moeq_plugin.checkpoint.checks.source.rounding import Rounding, Slices

_SLOPE = 0.02  # beside the square of the predicted error; 0.11 of 0.17 at 2 bits, 0.03 of 0.05 at 3
_OFFSET, _ROW_OFFSET = 0.25, 0.4  # in steps of the grid; 0.07, and 0.67 of 0.77 in one row
_EXCESS, _ROW_EXCESS = 5.0, 10.0  # 2.3 and 3.7; 3.5 was met once
_BELIEVED = 3.0  # the excess that limits of slices grow with: damage is not to excuse itself
# What a correction for earlier rounding may add to errors, as a share of the weight's size and of a
# row's. It does not shrink with the grid: 0.14 and 0.38 were seen at 8 bits after 8 sequences.
_CORRECTION, _ROW_CORRECTION = 0.2, 0.5
_UNRELATED = 0.25  # cosine; 0.40 at 2 bits
# standard errors: of rows, of columns, whose errors are far from even, and of many single groups
# (10.7, 10.6, 0.1 and 10.7 of corrected weights, 2.0, 5.4, 0 and 3.9 of others)
_SCATTER = {"rows": 11.0, "columns": 12.0, "groups of columns": 6.0, "groups": 11.0}
_TINY = 1e-30
_DEAD, _ALIVE = 1e-8, 1e-6  # squares, of a slice in itself and of a slice in the mean of all
# the most that rounding to zero takes from a slice, where every weight is half a step
_TO_ZERO = 3.0


def is_unrelated(rounding: Rounding) -> bool:
    """Tell whether a weight has nothing to do with its original."""
    whole = rounding.whole()
    return float(whole.ww) > 0 and not float(whole.cosine()) > _UNRELATED


def loss_of_all(rounding: Rounding) -> str | None:
    """Return what neither rounding nor a correction does to a weight, a row or a column.

    Args:
        rounding: what was done.

    Returns:
        What is lost of all that there was, ``None`` if nothing is.
    """
    whole, rows = rounding.whole(), rounding.rows()
    if not float(whole.ww):
        return "the source's weight is zero, this one is not" if float(whole.qq) else None
    if is_unrelated(rounding):
        return f"its cosine with the source's is {float(whole.cosine()):.2f}"
    dead = _num_dead(rows)
    if dead:
        return f"{dead} of {len(rows.ww)} rows are zero, and not in the source"
    dead = _num_dead(rounding.columns, rounded=_TO_ZERO)
    if dead > 0.02 * len(rounding.columns.ww):  # GPTQ zeroes columns whose input is always zero
        return f"{dead} of {len(rounding.columns.ww)} columns are zero, and not in the source"
    return None


def damage(rounding: Rounding, *, is_rescaled: bool = False) -> str | None:
    """Return what rounding cannot have done to a weight, ``None`` if it may all be rounding.

    Args:
        rounding: what was done.
        is_rescaled: whether the original was fitted to the weight, so that slopes say nothing of
            the whole and its columns.
    """
    lost = loss_of_all(rounding)
    whole, rows = rounding.whole(), rounding.rows()
    if lost or not float(whole.ww):
        return lost
    excess, predicted = float(whole.excess()), float(whole.predicted())
    clipped = _SLOPE + predicted**2 + (0.1 if is_rescaled else 0.0)
    slope, offset = float(whole.slope()), float(whole.mean_offset())
    # of few weights even the slope of all of them scatters
    most = clipped + _SCATTER["rows"] * min(max(excess, 1.0), 3.0) * float(_slope_error(whole))
    if not is_rescaled and not abs(slope - 1) <= most:
        return f"it is {slope:.3g} times the source's, at most {most:.2g} off 1 is rounding"
    if not abs(offset) <= _OFFSET:
        return f"it is {offset:+.2f} steps of its grid off the source's: zero points?"
    most = _EXCESS + _CORRECTION / max(predicted, _TINY)
    if not excess <= most:
        return f"its error is {excess:.1f} times what its grid explains, at most {most:.0f} is"
    beyond = ~(rows.excess() <= _ROW_EXCESS + _ROW_CORRECTION / rows.predicted().clamp_min(_TINY))
    if bool(beyond.any()):
        worst = int(torch.where(beyond, rows.excess(), 0.0).argmax())
        return f"the error of row {worst} is {float(rows.excess()[worst]):.1f} times its grid's"
    believed = min(excess, _BELIEVED + _CORRECTION / max(predicted, _TINY))
    return _uneven(rounding.evened(), clipped, believed, is_rescaled)


def _uneven(rounding: Rounding, clipped: float, excess: float, is_rescaled: bool) -> str | None:
    slices = {
        "rows": rounding.rows(),
        "columns": rounding.columns,
        "groups of columns": rounding.runs(),
        "groups": rounding.groups,
    }
    if is_rescaled:
        del slices["columns"]
    for name, parts in slices.items():
        scatter = _SCATTER[name] * max(excess, 1.0)
        alive = parts.ww > _ALIVE * parts.ww.mean()
        beyond = alive & ~((parts.slope() - 1).abs() <= clipped + scatter * _slope_error(parts))
        if bool(beyond.any()):
            furthest = float((parts.slope() - 1)[beyond].abs().max())
            return f"{int(beyond.sum())} {name} are up to {furthest:.0%} off the source's"
        if name == "columns":
            continue
        limit = _ROW_OFFSET + scatter / (12 * parts.count).sqrt()
        beyond = ~(parts.mean_offset().abs() <= limit)
        if bool(beyond.any()):
            return (
                f"{int(beyond.sum())} {name} are up to "
                f"{float(parts.mean_offset()[beyond].abs().max()):.2f} steps of the grid off: "
                "zero points?"
            )
    return None


def _slope_error(parts: Slices) -> torch.Tensor:
    """Return the standard error of slopes where weights are rounded to nearest."""
    return (parts.grid / parts.count).sqrt() / parts.ww.sqrt().clamp_min(_TINY)


def _num_dead(parts: Slices, rounded: float = 0.0) -> int:
    """Count slices that are zero, and not in the source.

    Args:
        parts: the slices.
        rounded: how much of a slice rounding may have taken, in units of the usual error; in a
            linear of two rows every seventh weight is less than half a step, and so is both of
            many a column.
    """
    alive = parts.ww > _ALIVE * parts.ww.mean()
    usual = float(parts.excess().square().median().clamp(1.0, 9.0))  # dead slices are the fewer
    beyond = parts.ww > rounded * usual * parts.grid
    return int((alive & beyond & (parts.qq <= _DEAD * parts.ww)).sum())
