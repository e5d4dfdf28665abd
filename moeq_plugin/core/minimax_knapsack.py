"""Multiple-choice knapsack for several domains: the largest sum of losses is to be least.

For weights ``w`` of the domains, non-negative with sum 1, the least ``w``-weighted sum is a lower
bound, and one call of :func:`moeq_plugin.core.knapsack.choose_options` finds it. The best weights
are found by cutting planes; what is left is closed by HiGHS where the instance is small.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize, sparse  # type: ignore[import-untyped]

from moeq_plugin.core.knapsack import Solution, choose_options, whole_sizes

_CUTS = 100
_MIP_GROUPS, _MIP_TOLERANCE, _MIP_SECONDS, _MIP_ATTEMPTS = 400, 1e-6, 60, 3


def minimize_worst_ratio(ratio: np.ndarray, num_bytes: np.ndarray, limit: int) -> Solution:
    """Choose one option per group so that the largest sum over domains is least.

    The best choice on the way to the best weights is typically within 1e-3 of the bound for
    thousands of groups, 1e-2 for dozens. Up to 400 groups the rest is closed by HiGHS, as
    ``minimise t`` with every domain's sum at most ``t``. Its tolerances are floating-point: the
    choice it returns is checked in whole bytes.

    Args:
        ratio: ``[domains, groups, options]`` float64, non-negative, each domain scaled so that
            sums of interest are around 1; ``inf`` in any domain forbids an option.
        num_bytes: ``[groups, options]`` int64.
        limit: bytes that all groups may take together, at least those of the smallest options.

    Returns:
        The choice, its largest sum, the better of the two bounds (HiGHS's holds to about 1e-6),
        its bytes, and 0 for the price, which has no single value here.

    Raises:
        ValueError: if a group has no option or the smallest options exceed the limit.
    """
    choice, bound = _balance_domains(ratio, num_bytes, limit)
    value = _worst(ratio, choice)
    if ratio.shape[1] <= _MIP_GROUPS and value - bound > _MIP_TOLERANCE * value:
        found, mip_bound = _solve_mip(ratio, num_bytes, limit, value)
        bound = max(bound, mip_bound)
        if found is not None and _worst(ratio, found) < value:
            choice, value = found, _worst(ratio, found)
    used = int(num_bytes[np.arange(len(choice)), choice].sum())
    return Solution(choice, value, min(bound, value), used, 0.0)


def _worst(ratio: np.ndarray, choice: np.ndarray) -> float:
    return max(math.fsum(r[np.arange(len(choice)), choice]) for r in ratio)


def _balance_domains(
    ratio: np.ndarray, num_bytes: np.ndarray, limit: int
) -> tuple[np.ndarray, float]:
    """Return the best of the choices that are optimal for some weights, and the best bound."""
    domains, groups, _ = ratio.shape
    allowed = np.all(np.isfinite(ratio), axis=0)
    finite = np.where(allowed, ratio, 0.0)
    weights, bound = np.full(domains, 1 / domains), 0.0
    choices: list[np.ndarray] = []
    sums: list[np.ndarray] = []
    for _ in range(_CUTS):
        weighted = np.where(allowed, np.tensordot(weights, finite, 1), np.inf)
        solution = choose_options(weighted, num_bytes, limit)
        bound = max(bound, solution.bound)
        choices.append(solution.choice)
        sums.append(finite[:, np.arange(groups), solution.choice].sum(1))
        # weights, and the largest bound that the choices so far would leave them
        master = optimize.linprog(
            np.append(np.zeros(domains), -1.0),
            A_ub=np.insert(-np.array(sums), domains, 1.0, axis=1),
            b_ub=np.zeros(len(sums)),
            A_eq=np.append(np.ones(domains), 0.0)[None],
            b_eq=[1.0],
        )
        weights = np.maximum(master.x[:domains], 0.0)
        weights /= weights.sum()
        if -master.fun - bound <= _MIP_TOLERANCE * bound:
            break
    return choices[int(np.argmin([s.max() for s in sums]))], bound


def _solve_mip(
    ratio: np.ndarray, num_bytes: np.ndarray, limit: int, value: float
) -> tuple[np.ndarray | None, float]:
    """Return HiGHS's choice, ``None`` if it has none within the limit, and its bound."""
    domains, groups, options = ratio.shape
    allowed = np.all(np.isfinite(ratio), axis=0)
    terms = np.where(allowed, ratio, 0.0) / value * groups  # far above HiGHS's tolerances
    size, limit_size, _ = whole_sizes(allowed, num_bytes, limit)
    capacity = limit_size
    one_each = sparse.kron(sparse.eye_array(groups), np.ones((1, options)))
    sums = np.concatenate([terms.reshape(domains, -1), size.reshape(1, -1)])
    t = np.concatenate([np.zeros(groups), -np.ones(domains), np.zeros(1)])
    matrix = sparse.hstack([sparse.vstack([one_each, sums]), t[:, None]]).tocsc()
    bound = 0.0
    for _ in range(_MIP_ATTEMPTS):
        upper = np.concatenate([np.ones(groups), np.zeros(domains), [capacity]])
        result = optimize.milp(
            np.append(np.zeros(groups * options), 1.0),
            integrality=np.append(np.ones(groups * options), 0),
            bounds=optimize.Bounds(0, np.append(allowed.ravel(), np.inf)),
            constraints=optimize.LinearConstraint(
                matrix, np.append(np.ones(groups), np.full(domains + 1, -np.inf)), upper
            ),
            options={"mip_rel_gap": _MIP_TOLERANCE, "time_limit": _MIP_SECONDS},
        )
        if capacity == limit_size and result.mip_dual_bound is not None:
            bound = result.mip_dual_bound * value / groups
        if result.x is None:
            break
        choice = result.x[:-1].reshape(groups, options).argmax(1)
        excess = int(size[np.arange(groups), choice].sum()) - limit_size
        if excess <= 0:
            return choice, bound
        capacity -= excess
    return None, bound
