"""Which weights stay on a scalar grid and which get something better?

RWKVQuant (arXiv:2505.03803) keeps a weight scalar if ``P_c < tau_c`` and ``P_f < tau_f``
(:mod:`moeq_plugin.core.uniformity`). Its thresholds are absolute numbers, fitted per model so that
about nine weights of ten stay scalar. Where we differ: by default the share is given and the
weights are ranked, ``max(rank of P_c, rank of P_f)``, which is the same conjunction with both
thresholds at a common percentile. It needs no fitting and survives any monotone change of either
proxy.

Weights that a server fuses, or the experts of one layer, can be told to decide together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from moeq_plugin.core.uniformity import UniformityScore


@dataclass(frozen=True)
class _Unit:
    """Weights that decide together, with what they are ranked by."""

    names: tuple[str, ...]
    size: int
    difficulty: tuple[float, float]
    degenerate: bool


def choose_scalar(
    scores: Mapping[str, UniformityScore],
    *,
    scalar_frac: float = 0.9,
    sizes: Mapping[str, int] | None = None,
    groups: Sequence[Collection[str]] = (),
) -> frozenset[str]:
    """Return the names of the weights that are the easiest for a scalar grid.

    Groups take the mean rank of their members, weighted by size. Units of equal difficulty are
    taken in the order of their names, so that the order of ``scores`` does not matter.

    Args:
        scores: the score of each weight.
        scalar_frac: share of the weights to keep scalar, 0 to 1: by number, as the paper counts
            them, or by elements if ``sizes`` are given. The nearest reachable share is taken, of
            two equally near the smaller.
        sizes: elements of each weight; ``None`` counts every weight as one.
        groups: names that have to decide alike; names without a score are ignored.

    Returns:
        Names. Degenerate weights are always among them: a scalar grid represents a constant.

    Raises:
        ValueError: if the share is out of range or a name is in two groups.

    Example:
        >>> easy, hard = UniformityScore(0.4, 1.5, 99), UniformityScore(4.0, 9e4, 99)
        >>> sorted(choose_scalar({"a": easy, "b": hard, "c": easy}, scalar_frac=2 / 3))
        ['a', 'c']
    """
    if not 0 <= scalar_frac <= 1:
        raise ValueError(f"scalar_frac must be between 0 and 1, got {scalar_frac}")
    units = _units(scores, sizes or dict.fromkeys(scores, 1), groups)
    total = sum(unit.size for unit in units)
    scalar: list[str] = []
    taken = 0
    for unit in sorted(units, key=lambda u: (not u.degenerate, max(u.difficulty), u.names)):
        # half a unit too few is as far off as half a unit too many
        if not unit.degenerate and taken + unit.size / 2 >= scalar_frac * total:
            break
        scalar += unit.names
        taken += unit.size
    return frozenset(scalar)


def choose_scalar_below(
    scores: Mapping[str, UniformityScore],
    tau_coarse: float,
    tau_fine: float,
    *,
    groups: Sequence[Collection[str]] = (),
) -> frozenset[str]:
    """Return the names of the weights with both proxies below the paper's kind of threshold.

    A group stays scalar only if all its members do. The published thresholds, 1.54 and 30 for
    RWKV-7, belong to scores of the gaps ``"unique"`` on float16 weights.

    Args:
        scores: the score of each weight.
        tau_coarse: ``tau_c``.
        tau_fine: ``tau_f``.
        groups: names that have to decide alike; names without a score are ignored.

    Raises:
        ValueError: if a name is in two groups.
    """
    return frozenset(
        name
        for members in _members(scores, groups)
        if all(_is_below(scores[name], tau_coarse, tau_fine) for name in members)
        for name in members
    )


def _is_below(score: UniformityScore, tau_coarse: float, tau_fine: float) -> bool:
    return score.degenerate or (score.p_coarse < tau_coarse and score.p_fine < tau_fine)


def _units(
    scores: Mapping[str, UniformityScore],
    sizes: Mapping[str, int],
    groups: Sequence[Collection[str]],
) -> list[_Unit]:
    coarse = _ranks({name: score.p_coarse for name, score in scores.items()})
    fine = _ranks({name: score.p_fine for name, score in scores.items()})
    units = []
    for members in _members(scores, groups):
        size = sum(sizes[name] for name in members)
        mean = [sum(sizes[n] * rank[n] for n in members) / size for rank in (coarse, fine)]
        degenerate = all(scores[name].degenerate for name in members)
        units.append(_Unit(members, size, (mean[0], mean[1]), degenerate))
    return units


def _ranks(values: Mapping[str, float]) -> dict[str, int]:
    """Return how many values are smaller, so that equal values have equal ranks."""
    ordered = sorted(values.values())
    return {name: bisect_left(ordered, value) for name, value in values.items()}


def _members(
    scores: Mapping[str, UniformityScore], groups: Sequence[Collection[str]]
) -> list[tuple[str, ...]]:
    """Return the scored names in sorted tuples, one per group and one per name without a group.

    Raises:
        ValueError: if a name is in two groups.
    """
    grouped = [tuple(sorted(name for name in group if name in scores)) for group in groups]
    names = [name for group in grouped for name in group]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"these weights are in more than one group: {', '.join(twice)}")
    alone = set(scores) - set(names)
    return [group for group in grouped if group] + [(name,) for name in sorted(alone)]
