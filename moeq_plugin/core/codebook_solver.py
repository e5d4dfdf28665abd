"""GPTQ with a codebook: what rounding to a centroid loses is passed on to the columns to come.

RWKVQuant (arXiv:2505.03803, after GPTVQ, arXiv:2402.15319) in three steps per column group: fit
its codebooks to the weights as they stand by now, round vector after vector, compensate. Symbols
of :mod:`moeq_plugin.core.gptq`: columns are processed from the end, along the rows of ``F`` with
``inverse(H) = F.T @ F``. Column groups are put in the wanted order for that; the columns of one
keep theirs.

Rounding the vector ``w`` of columns ``v`` to ``q`` costs ``|(w - q) @ inverse(F[v, v])|^2 / 2``
once all later columns have adapted. So the nearest centroid is looked up in these coordinates,
where GPTVQ takes the diagonal of the Hessian, and the squared entries of ``1 / diagonal(F)`` weight
the k-means.

After the last column the codes stay and the codebooks move: the loss is a quadratic function of
all centroids, which conjugate gradients minimize (the paper's code takes 25 steps of Adam).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moeq_plugin.core.codebook import (
    CodebookFormat,
    CodebookWeight,
    assemble,
    codebook_of_vector,
    dequantize_codebook,
    fit_codebooks,
    quantize_codebook,
)
from moeq_plugin.core.factorization import inverse_factor, revive_dead_columns
from moeq_plugin.core.kmeans import nearest


@dataclass(frozen=True)
class CodebookSolution:
    """The result of :func:`solve_codebook`.

    Attributes:
        weight: the weight in codebook format.
        loss: ``[out]`` float32, half of each row's share of ``trace(D @ H @ D.T)``.
        is_nearest: true if the Hessian could not be factorized and every vector merely went to
            the nearest centroid.
    """

    weight: CodebookWeight
    loss: torch.Tensor
    is_nearest: bool


def solve_codebook(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    form: CodebookFormat,
    *,
    dampening_frac: float = 0.01,
    actorder: bool = True,
    refine_steps: int = 8,
) -> CodebookSolution:
    """Encode a weight so that ``trace(D @ H @ D.T)`` stays small.

    Args:
        weight: ``[out, in]``, any float dtype; not modified.
        hessian: ``[in, in]`` second moments; zeros on the diagonal are overwritten. A positive
            factor changes nothing but the loss.
        form: the codebook format.
        dampening_frac: fraction of the mean diagonal that is added to the diagonal.
        actorder: process column groups in descending order of their mean second moment; nothing
            is stored. Single columns cannot be reordered, since their group shares a codebook.
        refine_steps: steps of conjugate gradients on the codebooks; 0 keeps those of k-means.

    Raises:
        ValueError: if shapes disagree.
    """
    if weight.ndim != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            "weight must be [out, in] and hessian [in, in], got "
            f"{list(weight.shape)} and {list(hessian.shape)}"
        )
    form.grid((weight.shape[0], weight.shape[1]))  # refuses indivisible columns
    diagonal = revive_dead_columns(hessian)
    groups = list(torch.arange(weight.shape[1], device=weight.device).split(form.group_columns))
    if actorder:
        groups.sort(key=lambda columns: diagonal[columns].mean().item())
    else:
        groups.reverse()
    order = torch.cat(groups)
    factor, is_nearest = inverse_factor([hessian], order[None], dampening_frac)
    encoded = _encode_groups(weight.float()[:, order], factor[0], groups, form, weight.dtype)
    if refine_steps and not is_nearest:
        encoded, loss = refine_codebooks(encoded, weight, hessian, refine_steps)
    else:
        loss = _row_losses(encoded.decode().float() - weight.float(), hessian.float())
    return CodebookSolution(encoded, loss, bool(is_nearest))


def _encode_groups(
    W: torch.Tensor,
    F: torch.Tensor,
    groups: list[torch.Tensor],
    form: CodebookFormat,
    dtype: torch.dtype,
) -> CodebookWeight:
    """Encode ``W`` ``[out, in]``, whose columns are in the order of ``groups``, from the end."""
    parts: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    end = W.shape[1]
    for columns in reversed(groups):
        start = end - len(columns)
        block, within = W[:, start:end], F[start:end, start:end]
        importance = within.diagonal().square().reciprocal()
        codebook, scale = fit_codebooks(block, importance, form, dtype)
        centroids = dequantize_codebook(codebook, scale).float()
        codes, errors = _encode_columns(block, within, centroids, form)
        W[:, :start] -= errors @ F[start:end, :start]
        parts[int(columns[0])] = (codes, codebook, scale)
        end = start
    return assemble([parts[first] for first in sorted(parts)], form)


def _encode_columns(
    block: torch.Tensor, F: torch.Tensor, centroids: torch.Tensor, form: CodebookFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``[out, vectors]`` codes and ``[out, columns]`` errors; modifies ``block``.

    Args:
        block: ``[out, columns]`` of one column group.
        F: ``[columns, columns]`` lower triangular.
        centroids: ``[row groups, centroids, vector_dim]``.
        form: the format.
    """
    rows, columns = block.shape
    codes = torch.empty(rows, columns // form.vector_dim, dtype=torch.int64, device=block.device)
    errors = torch.empty_like(block)
    missing = -rows % form.group_rows
    one = block.new_ones(1, 1, 1)
    for start in range(columns - form.vector_dim, -1, -form.vector_dim):
        v = slice(start, start + form.vector_dim)
        vectors = torch.nn.functional.pad(block[:, v], (0, 0, 0, missing))
        vectors = vectors.view(len(centroids), form.group_rows, form.vector_dim)
        inverse = torch.linalg.inv(F[v, v])
        index = nearest(vectors @ inverse, one, centroids @ inverse)
        rounded = centroids.gather(1, index[..., None].expand_as(vectors)).flatten(0, 1)[:rows]
        errors[:, v] = (block[:, v] - rounded) @ inverse
        block[:, :start] -= errors[:, v] @ F[v, :start]
        codes[:, start // form.vector_dim] = index.flatten()[:rows]
    return codes, errors


def refine_codebooks(
    encoded: CodebookWeight, weight: torch.Tensor, hessian: torch.Tensor, steps: int
) -> tuple[CodebookWeight, torch.Tensor]:
    """Move the centroids to where ``trace(D @ H @ D.T)`` is least for the codes as they are.

    Row groups are independent least-squares problems; each takes its own steps of conjugate
    gradients, scaled by how often a centroid is used. A row group whose loss does not fall once
    its codebooks are rounded to int8 again keeps the codebooks it had.

    Args:
        encoded: the encoded weight.
        weight: ``[out, in]``, what it should stand for.
        hessian: ``[in, in]``.
        steps: conjugate gradient steps.

    Returns:
        The refined weight and its loss, as of :class:`CodebookSolution`.

    Cost: ``steps + 2`` products of the weight with the Hessian, which is most of the time that
    :func:`solve_codebook` takes if there are many columns.
    """
    form, codes, H = encoded.form, encoded.codes, hessian.float()
    shape = (*encoded.codebook.shape[:2], form.num_centroids, form.vector_dim)
    index = codebook_of_vector(codes.shape, form, codes.device) * form.num_centroids + codes
    index = index.flatten()[:, None].expand(-1, form.vector_dim)

    def spread(centroids: torch.Tensor) -> torch.Tensor:
        vectors = centroids.reshape(-1, form.vector_dim).gather(0, index)
        return vectors.view(weight.shape)

    def collect(values: torch.Tensor) -> torch.Tensor:
        zeros = values.new_zeros(shape).view(-1, form.vector_dim)
        return zeros.scatter_add_(0, index, values.reshape(-1, form.vector_dim)).view(shape)

    start = dequantize_codebook(encoded.codebook, encoded.scale).float()
    curvature = collect(H.diagonal().expand_as(weight)).clamp(min=torch.finfo(H.dtype).tiny)
    difference = weight.float() - spread(start)
    gradient = difference @ H
    loss = (gradient * difference).sum(1) / 2
    step = _conjugate_gradients(
        lambda c: collect(spread(c) @ H), collect(gradient), 1 / curvature, steps
    )
    codebook, scale = quantize_codebook(start + step, encoded.scale.dtype)
    refined = replace(encoded, codebook=codebook, scale=scale)
    refined_loss = _row_losses(refined.decode().float() - weight.float(), H)

    def of_row_groups(rows: torch.Tensor) -> torch.Tensor:
        missing = -len(rows) % form.group_rows
        return torch.nn.functional.pad(rows, (0, missing)).view(-1, form.group_rows).sum(1)

    better = of_row_groups(refined_loss) < of_row_groups(loss)
    weight_of_better = replace(
        encoded,
        codebook=torch.where(better[:, None, None, None], codebook, encoded.codebook),
        scale=torch.where(better[:, None], scale, encoded.scale),
    )
    is_better = better.repeat_interleave(form.group_rows)[: len(loss)]
    return weight_of_better, torch.where(is_better, refined_loss, loss)


def _row_losses(difference: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return ``[out]``, half of each row's share of ``trace(D @ H @ D.T)``."""
    return (difference @ hessian * difference).sum(1) / 2


def _conjugate_gradients(
    apply: Callable[[torch.Tensor], torch.Tensor],
    rest: torch.Tensor,
    preconditioner: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """Solve ``apply(x) = rest`` approximately, one independent system per first index."""

    def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).flatten(1).sum(1)[:, None, None, None]

    tiny = torch.finfo(rest.dtype).tiny
    x = torch.zeros_like(rest)
    scaled = preconditioner * rest
    direction, size = scaled, dot(rest, scaled)
    for _ in range(steps):
        image = apply(direction)
        length = size / dot(direction, image).clamp(min=tiny)
        x = x + length * direction
        rest = rest - length * image
        scaled = preconditioner * rest
        size, previous = dot(rest, scaled), size
        direction = scaled + size / previous.clamp(min=tiny) * direction
    return x
