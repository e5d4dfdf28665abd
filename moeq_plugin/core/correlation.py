"""How far errors of experts that work on the same token add up beyond the sum of their losses.

With option ``x_e`` of expert ``e`` the loss of a layer is the quadratic form

    ``sum_ef Q[e, x_e, f, x_f]``,  ``Q[e, b, f, c] = sum_t <error_t(e, b), error_t(f, c)>``

over tokens ``t`` that reach both. Bit allocation keeps its diagonal only. Let ``R_ef`` be the
largest ``|correlation|`` of any option of ``e`` with any of ``f``, 1 on the diagonal, and
``lambda`` its largest eigenvalue. Then for *every* choice, with ``D`` the sum of the diagonal,
``(2 - lambda) * D <= loss <= lambda * D``: the choice that is best for ``D`` is within a factor
``lambda / (2 - lambda)`` of the best there is. No solver of quadratic problems is needed to know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_NO_CHANGE = 1e-12  # of the start's loss: smaller improvements may be rounding

_Step = tuple[float, list[tuple[int, int, int]]]  # change of the loss; (layer, expert, option)


@dataclass(frozen=True)
class Certificate:
    """What the correlations of one layer can change at most.

    Attributes:
        eigenvalue: ``lambda``, 1 where errors of different experts are orthogonal.
        factor: ``lambda / (2 - lambda)``, infinite from ``lambda = 2`` on: no guarantee.
        correlation: ``[experts, experts]`` float64, ``R``.
    """

    eigenvalue: float
    factor: float
    correlation: torch.Tensor


@dataclass(frozen=True)
class Improvement:
    """The result of :func:`improve_by_swaps`.

    Attributes:
        choices: for each layer ``[experts]`` int64 index of the option.
        loss: quadratic loss of ``choices``, all layers together.
        relative: the share of the quadratic loss of the start that is gone, 0 or more.
    """

    choices: list[np.ndarray]
    loss: float
    relative: float


def accumulate_cross_terms(
    Q: torch.Tensor, errors: torch.Tensor, expert_index: torch.Tensor, *, chunk_size: int = 64
) -> None:
    """Add the inner products of one batch of errors to ``Q``, in place.

    Args:
        Q: ``[experts, options, experts, options]`` running sum, contiguous, best float64.
        errors: ``[tokens, slots, options, features]``, the output error of the expert in each
            slot at each option, times its router weight and the root of the sensitivity of each
            feature. Products are taken in the dtype of ``Q``.
        expert_index: ``[tokens, slots]`` int64, the expert in each slot.
        chunk_size: tokens at once; memory only.

    Raises:
        ValueError: if shapes disagree.
    """
    experts, options = Q.shape[:2]
    if errors.ndim != 4 or errors.shape[2] != options or errors.shape[:2] != expert_index.shape:
        raise ValueError(
            f"errors must be [tokens, slots, {options}, features] with expert_index "
            f"[tokens, slots], got {list(errors.shape)} and {list(expert_index.shape)}"
        )
    offset = torch.arange(options, device=Q.device)
    for some, index in zip(errors.split(chunk_size), expert_index.split(chunk_size), strict=True):
        vectors = some.flatten(1, 2).to(Q)  # [chunk, slots * options, features]
        row = (index.to(Q.device)[..., None] * options + offset).flatten(1)
        place = row[:, :, None] * (experts * options) + row[:, None]
        Q.view(-1).index_add_(0, place.flatten(), (vectors @ vectors.mT).flatten())


def coactivation(expert_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return ``[experts, experts]`` float64, the share of tokens routed to both experts.

    On the diagonal the share of tokens routed to the expert. Zero where there are no tokens.

    Example:
        >>> coactivation(torch.tensor([[0, 1], [1, 2]]), 3)
        tensor([[0.5000, 0.5000, 0.0000],
                [0.5000, 1.0000, 0.5000],
                [0.0000, 0.5000, 0.5000]], dtype=torch.float64)
    """
    is_routed = torch.zeros(
        len(expert_index), num_experts, dtype=torch.float64, device=expert_index.device
    ).scatter_(1, expert_index, 1.0)
    return is_routed.T @ is_routed / max(len(expert_index), 1)


def certificate(Q: torch.Tensor) -> Certificate:
    """Bound what correlations between experts can change, for all choices at once.

    Args:
        Q: ``[experts, options, experts, options]``, symmetric positive semidefinite. An option
            without error correlates with nothing.
    """
    size = Q.shape[0] * Q.shape[1]
    matrix = Q.double().reshape(size, size)
    diagonal = matrix.diagonal()
    inverse_root = torch.where(diagonal > 0, diagonal, math.inf).rsqrt()
    rho = (matrix * inverse_root[:, None] * inverse_root).abs().clamp(max=1)
    correlation = rho.view(Q.shape).amax((1, 3))
    correlation.fill_diagonal_(1)
    eigenvalue = float(torch.linalg.eigvalsh(correlation)[-1])
    factor = eigenvalue / (2 - eigenvalue) if eigenvalue < 2 else math.inf
    return Certificate(eigenvalue, factor, correlation)


def quadratic_loss(Q: torch.Tensor, choice: np.ndarray) -> float:
    """Return ``sum_ef Q[e, choice[e], f, choice[f]]``."""
    of = torch.arange(len(Q)), torch.from_numpy(choice)
    return float(Q[of][:, *of].sum())


def improve_by_swaps(
    choices: Sequence[np.ndarray],
    Qs: Sequence[torch.Tensor],
    num_bytes: Sequence[np.ndarray],
    limit: int,
    *,
    max_steps: int = 1000,
) -> Improvement:
    """Change one expert's option or two at once, always the best such step, while it helps.

    The two may be of one layer or of two, so that bytes move to where the quadratic loss, not
    only its diagonal, needs them. A local optimum: never worse than the start, not certified.

    Args:
        choices: for each layer ``[experts]`` int64, the start, such as the additive optimum.
        Qs: for each layer ``[experts, options, experts, options]``, symmetric; ``inf`` on the
            diagonal forbids an option.
        num_bytes: for each layer ``[experts, options]`` int64.
        limit: bytes that all layers' experts may take together.
        max_steps: steps at most.

    Returns:
        The choices, their loss and the relative improvement.

    Raises:
        ValueError: if the start exceeds the limit.

    Cost: ``O((experts * options)^2)`` per layer and step in memory and, for layers that the last
    step changed, time; other layers cost a comparison per pair.
    """
    layers = [
        _Layer(choice.copy(), Q.double().cpu().numpy(), size)
        for choice, Q, size in zip(choices, Qs, num_bytes, strict=True)
    ]
    free = limit - sum(layer.used for layer in layers)
    if free < 0:
        raise ValueError(f"the start exceeds the limit of {limit} bytes by {-free}")
    start = sum(layer.loss for layer in layers)
    for _ in range(max_steps):
        change, step = min(
            [layer.best(free, i) for i, layer in enumerate(layers)] + [_best_across(layers, free)],
            key=lambda found: found[0],
        )
        if change >= -_NO_CHANGE * start:
            break
        for i, expert, option in step:
            free -= layers[i].extra[expert, option]
            layers[i].choice[expert] = option
        for i in {i for i, _, _ in step}:
            layers[i].update()
    loss = sum(layer.loss for layer in layers)
    relative = (start - loss) / start if start > 0 else 0.0
    return Improvement([layer.choice for layer in layers], loss, relative)


class _Layer:
    """A layer's choice and what every change of one or two experts would do to its loss."""

    def __init__(self, choice: np.ndarray, Q: np.ndarray, num_bytes: np.ndarray) -> None:
        self.choice, self.Q, self.num_bytes = choice, Q, num_bytes
        self.update()

    def update(self) -> None:
        """Follow a change of ``choice``."""
        experts = np.arange(len(self.choice))
        of = (experts, self.choice)
        self.used = int(self.num_bytes[of].sum())
        self.extra = self.num_bytes - self.num_bytes[of][:, None]  # [experts, options]
        with_chosen = self.Q[:, :, *of]  # [experts, options, experts]
        both = with_chosen[of]  # [experts, experts]
        self.loss = float(both.sum())
        others = with_chosen.sum(2) - with_chosen[experts, :, experts]
        share = np.einsum("ebeb->eb", self.Q) + 2 * others
        self.change = share - share[of][:, None]
        cross = self.Q - with_chosen[..., None] - with_chosen.transpose(2, 0, 1)[:, None]
        cross += both[:, None, :, None]
        pair = self.change[:, :, None, None] + self.change + 2 * cross
        pair[experts, :, experts] = np.inf
        self.pair = pair

    def best(self, free: int, index: int) -> _Step:
        """Return the best change of one or two experts that takes at most ``free`` bytes."""
        change = np.where(self.extra <= free, self.change, np.inf)
        one = np.unravel_index(change.argmin(), change.shape)
        fits = self.extra[:, :, None, None] + self.extra <= free
        pair = np.where(fits, self.pair, np.inf)
        two = np.unravel_index(pair.argmin(), pair.shape)
        if change[one] <= pair[two]:
            return float(change[one]), [(index, int(one[0]), int(one[1]))]
        e, b, f, c = map(int, two)
        return float(pair[two]), [(index, e, b), (index, f, c)]


def _best_across(layers: Sequence[_Layer], free: int) -> _Step:
    """Return the best two changes in different layers that take at most ``free`` bytes."""
    places = np.array(
        [(i, e, b) for i, layer in enumerate(layers) for e, b in np.ndindex(layer.extra.shape)]
    )
    extra = np.concatenate([layer.extra.ravel() for layer in layers])
    change = np.concatenate([layer.change.ravel() for layer in layers])
    by_size = np.argsort(extra, kind="stable")
    found: _Step = (np.inf, [])
    for i in range(len(layers) - 1):
        ours = np.flatnonzero(places[:, 0] == i)
        theirs = by_size[places[by_size, 0] > i]
        least = np.minimum.accumulate(change[theirs])
        last = np.searchsorted(extra[theirs], free - extra[ours], side="right") - 1
        total = np.where(last >= 0, change[ours] + least[last], np.inf)
        k = int(total.argmin())
        if total[k] < found[0]:
            j = theirs[int(np.argmin(change[theirs][: last[k] + 1]))]
            steps = [tuple(map(int, places[p])) for p in (ours[k], j)]
            found = float(total[k]), [(s[0], s[1], s[2]) for s in steps]
    return found
