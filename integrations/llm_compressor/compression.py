"""Turn a layer's observations into quantized weights: guard, stack, solve, write back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationStrategy,
    QuantizationType,
)
from torch import nn

from moeq_plugin.core.gptq import Solution, solve
from moeq_plugin.core.grid import Grid
from moeq_plugin.core.hessian import SecondMoments, shrink_toward
from moeq_plugin.integrations.llm_compressor.calibration import (
    Calibration,
    Observation,
    TokenSample,
)
from moeq_plugin.report.record import Basis

_STACK_BYTES = 1 << 30  # weights and Hessians of the experts that are solved together


@dataclass
class Job:
    """Linears that share second moments and a scheme, ready to be solved together.

    Attributes:
        linears: the linears; their rows are stacked.
        args: their weight scheme.
        hessian: ``[in, in]``.
        basis: what the second moments rest on.
        effective_tokens: of the linears' own tokens.
    """

    linears: list[nn.Linear]
    args: QuantizationArgs
    hessian: torch.Tensor
    basis: Basis
    effective_tokens: float


def grid_of(args: QuantizationArgs) -> Grid | None:
    """Return the grid of a weight scheme, ``None`` if it is not an integer grid along rows."""
    by_rows = (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)
    if args.type != QuantizationType.INT or args.strategy not in by_rows:
        return None
    return Grid(args.num_bits, args.group_size, args.symmetric)


def describe(args: QuantizationArgs) -> str:
    """Return a weight scheme in words, such as ``W4 int symmetric group 128``."""
    symmetry = "symmetric" if args.symmetric else "asymmetric"
    strategy = QuantizationStrategy(args.strategy).value
    group = f"group {args.group_size}" if args.group_size else strategy
    return f"W{args.num_bits} {QuantizationType(args.type).value} {symmetry} {group}"


def guard(
    observation: Observation,
    calibration: Calibration,
    *,
    min_effective_tokens: float | None,
    shrinkage: float,
) -> tuple[torch.Tensor, Basis]:
    """Return a Hessian that does not starve the expert, and what it rests on.

    Args:
        observation: what the expert's own tokens gave.
        calibration: holds the sample of the layer's tokens.
        min_effective_tokens: threshold; ``None`` means the number of input features, below which
            the second moments cannot have full rank.
        shrinkage: see :func:`moeq_plugin.core.hessian.shrink_toward`.
    """
    moments, seat = observation.moments, observation.seat
    threshold = len(moments.hessian) if min_effective_tokens is None else min_effective_tokens
    effective = moments.effective_tokens
    is_expert = seat is not None and seat.expert is not None
    if not is_expert or effective >= threshold:
        return moments.mean(), Basis.OWN if effective > 0 else Basis.NONE
    assert seat is not None and seat.expert is not None  # is_expert says so
    sample = calibration.samples.get(seat.layer.experts)
    if sample is None or sample.rows is None or not len(sample.rows):
        return moments.mean(), Basis.OWN if effective > 0 else Basis.NONE
    of_layer = layer_moments(observation, seat.layer.expert(seat.expert), sample)
    hessian = shrink_toward(moments, of_layer, min_effective_tokens=threshold, shrinkage=shrinkage)
    if effective == 0:
        return hessian, Basis.LAYER
    return hessian, Basis.SHRUNK if shrinkage > 0 else Basis.OWN


@torch.no_grad()
def layer_moments(
    observation: Observation, expert: nn.Module, sample: TokenSample
) -> SecondMoments:
    """Return the second moments that the layer's tokens would give this expert's linear.

    For gate and up these are the sample's own; for down the sample is sent through the expert.
    """
    linear = observation.linears[0]
    if linear is not expert.down_proj:
        return sample.moments
    inputs: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    try:
        expert(sample.rows)
    finally:
        handle.remove()
    moments = SecondMoments.zeros(inputs[0].shape[-1], inputs[0].device)
    moments.add(inputs[0])
    return moments


def stacks(jobs: list[Job], max_jobs: int | None) -> Iterator[list[Job]]:
    """Group jobs of one shape and scheme, within a bound on memory.

    Args:
        jobs: all jobs of a layer.
        max_jobs: largest stack, ``None`` for what fits the bound.
    """
    alike: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        weights = [linear.weight for linear in job.linears]
        key = (
            *(tuple(weight.shape) for weight in weights),
            weights[0].dtype,
            job.hessian.device,
            job.args.model_dump_json(),
        )
        alike.setdefault(key, []).append(job)
    for members in alike.values():
        columns = members[0].linears[0].weight.shape[1]
        rows = sum(len(linear.weight) for linear in members[0].linears)
        fitting = max(1, _STACK_BYTES // (4 * columns * (4 * rows + 4 * columns)))
        size = min(fitting, max_jobs or fitting)
        yield from (members[start : start + size] for start in range(0, len(members), size))


@torch.no_grad()
def compress(
    stack: list[Job], *, block_size: int, dampening_frac: float
) -> list[dict[nn.Linear, float | None]]:
    """Solve a stack and write weights, scales and zero points into the linears.

    The weight observers must have seen their weights.

    Args:
        stack: jobs of one shape and scheme.
        block_size: see :func:`moeq_plugin.core.gptq.solve`.
        dampening_frac: likewise.

    Returns:
        For each job, the loss of each linear; ``None`` where it was rounded to nearest.
    """
    grid = grid_of(stack[0].args)
    assert grid is not None  # the caller sorted out other schemes
    qparams = [[linear.weight_observer.get_qparams() for linear in job.linears] for job in stack]
    scale = torch.stack([torch.cat([q["scale"] for q in row]) for row in qparams])
    zero_point = torch.stack([torch.cat([q["zero_point"] for q in row]) for row in qparams])
    weight = torch.stack([torch.cat([linear.weight for linear in job.linears]) for job in stack])
    solution = solve(
        weight,
        torch.stack([job.hessian for job in stack]),
        scale,
        zero_point,
        grid,
        block_size=block_size,
        dampening_frac=dampening_frac,
        actorder=stack[0].args.actorder is not None,
    )
    return [
        _write(job, index, solution, scale[index], zero_point[index])
        for index, job in enumerate(stack)
    ]


def _write(
    job: Job, index: int, solution: Solution, scale: torch.Tensor, zero_point: torch.Tensor
) -> dict[nn.Linear, float | None]:
    losses: dict[nn.Linear, float | None] = {}
    start = 0
    for linear in job.linears:
        rows = slice(start, start := start + len(linear.weight))
        dtype = linear.weight.dtype
        update_offload_parameter(linear, "weight", solution.weight[index, rows].to(dtype))
        update_offload_parameter(linear, "weight_scale", scale[rows].to(dtype))
        update_offload_parameter(
            linear, "weight_zero_point", zero_point[rows].to(job.args.zp_dtype)
        )
        failed = bool(solution.is_nearest[index])
        losses[linear] = None if failed else solution.loss[index, rows].sum().item()
    return losses
