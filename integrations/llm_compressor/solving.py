"""Turn guarded second moments into quantized weights: stack, solve, write back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from compressed_tensors.offload import update_offload_parameter
from compressed_tensors.quantization import (
    QuantizationArgs,
)
from llmcompressor.observers import Observer
from torch import nn

from moeq_plugin.core.gptq import Solution
from moeq_plugin.core.refined_gptq import solve_refined
from moeq_plugin.core.solver_options import ScaleSearch, SolverOptions
from moeq_plugin.integrations.llm_compressor.schemes import grid_of
from moeq_plugin.integrations.llm_compressor.unfinished import mark_changed
from moeq_plugin.records.run import Basis

_CPU_STACK_BYTES = 1 << 25  # larger stacks leave the caches and are no faster
_CPU_ROW_STACK_BYTES = 1 << 28  # where rows are rounded in blocks, a block is what caches hold
_ACCELERATOR_SHARE = 0.25  # of the free memory
# what the host completes a scheme with that names no observer
_DEFAULT_OBSERVERS = (None, "memoryless_minmax")


@dataclass
class Job:
    """Linears that share second moments and a scheme, ready to be solved together.

    Attributes:
        linears: the linears; their rows are stacked.
        args: their weight scheme.
        hessian: ``[in, in]``.
        weight_sum: what to divide the loss by for a mean over tokens.
        basis: what the second moments rest on.
        effective_tokens: of the linears' own tokens.
        output_moments: ``[out, out]`` of gradients at the outputs of all linears, ``None`` where
            outputs count one by one.
    """

    linears: list[nn.Linear]
    args: QuantizationArgs
    hessian: torch.Tensor
    weight_sum: float
    basis: Basis
    effective_tokens: float
    output_moments: torch.Tensor | None = None


def stacks(
    jobs: Iterable[Job], max_jobs: int | None, options: SolverOptions
) -> Iterator[list[Job]]:
    """Group jobs of one shape and scheme, within a bound on memory.

    Args:
        jobs: all jobs of a layer. Each is let go of once its stack has been consumed.
        max_jobs: largest stack, ``None`` for what fits the bound.
        options: how they will be rounded.
    """
    alike: dict[tuple[object, ...], list[Job]] = {}
    for job in jobs:
        weights = [linear.weight for linear in job.linears]
        shapes = [tuple(weight.shape) for weight in weights]
        scheme = job.args.model_dump_json()
        alike.setdefault((*shapes, weights[0].dtype, job.hessian.device, scheme), []).append(job)
    for members in alike.values():
        columns = members[0].linears[0].weight.shape[1]
        rows = sum(len(linear.weight) for linear in members[0].linears)
        # float32: the Hessian's factor and its inverse; weights as given, in work and rounded,
        # and what a refinement holds beside them: errors, their product with the Hessian, codes
        copies = 4 if options.is_plain else 9
        job_bytes = 4 * columns * (2 * columns + copies * rows)
        in_blocks = any(job.output_moments is not None for job in members)
        if in_blocks:
            job_bytes += 4 * rows * (3 * rows + 3 * columns)  # their factor; what is passed on
        fitting = max(1, _stack_bytes(members[0].hessian.device, in_blocks) // job_bytes)
        size = min(fitting, max_jobs or fitting)
        while members:
            stack = members[:size]
            del members[:size]
            yield stack


def _stack_bytes(device: torch.device, in_blocks: bool) -> int:
    if device.type == "cpu":
        return _CPU_ROW_STACK_BYTES if in_blocks else _CPU_STACK_BYTES
    free, _total = torch.accelerator.get_memory_info(device)
    return int(free * _ACCELERATOR_SHARE)


@dataclass(frozen=True)
class Rounded:
    """One job's weights on their grids.

    Attributes:
        solution: of the whole stack.
        index: of the job in the stack.
        scale: ``[rows, groups]`` of all the job's linears.
        zero_point: ``[rows, groups]``.
    """

    solution: Solution
    index: int
    scale: torch.Tensor
    zero_point: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """Return ``[rows, in]`` dequantized weights of all the job's linears."""
        return self.solution.weight[self.index]


@torch.no_grad()
def solve_stack(stack: list[Job], options: SolverOptions) -> list[Rounded]:
    """Round the weights of a stack of jobs; the linears stay as they are.

    The weight observers must have seen their weights. One that was asked for by name chooses the
    scales even where the options say to search them.

    Args:
        stack: jobs of one shape and scheme.
        options: how to round.
    """
    args = stack[0].args
    grid = grid_of(args)
    assert grid is not None  # the caller sorted out other schemes
    if args.observer not in _DEFAULT_OBSERVERS:
        options = replace(options, scale_search=ScaleSearch.GIVEN, signed=False)
    qparams = [[_observed_grid(linear) for linear in job.linears] for job in stack]
    scale = torch.stack([torch.cat([q["scale"] for q in row]) for row in qparams])
    zero_point = torch.stack([torch.cat([q["zero_point"] for q in row]) for row in qparams])
    weight = torch.stack([torch.cat([linear.weight for linear in job.linears]) for job in stack])
    refined = solve_refined(
        weight,
        [job.hessian for job in stack],
        scale,
        zero_point,
        grid,
        options,
        actorder=args.actorder is not None,
        output_moments=_output_moments(stack, weight.shape[1]),
    )
    return [
        Rounded(refined.solution, i, refined.scale[i], refined.zero_point[i])
        for i in range(len(stack))
    ]


def _output_moments(stack: list[Job], rows: int) -> list[torch.Tensor] | None:
    """Return those of each job, ``None`` where no job has any."""
    if all(job.output_moments is None for job in stack):
        return None
    return [
        # from zeros nothing follows: outputs count one by one
        job.hessian.new_zeros(rows, rows) if job.output_moments is None else job.output_moments
        for job in stack
    ]


def _observed_grid(linear: nn.Linear) -> dict[str, torch.Tensor]:
    """Return ``scale`` and ``zero_point`` that the weight observer has chosen."""
    observer = linear.weight_observer
    assert isinstance(observer, Observer)  # attached when calibration starts
    grid: dict[str, torch.Tensor] = observer.get_qparams()  # type: ignore[call-arg] # its decorator
    return grid


def write(job: Job, rounded: Rounded) -> dict[nn.Linear, float | None]:
    """Put weights, scales and zero points into the job's linears.

    Returns:
        The loss of each linear; ``None`` where it was rounded to nearest.
    """
    solution, index = rounded.solution, rounded.index
    losses: dict[nn.Linear, float | None] = {}
    start = 0
    for linear in job.linears:
        mark_changed(linear)
        rows = slice(start, start := start + len(linear.weight))
        dtype, zp_dtype = linear.weight.dtype, job.args.zp_dtype
        update_offload_parameter(linear, "weight", rounded.weight[rows].to(dtype))
        update_offload_parameter(linear, "weight_scale", rounded.scale[rows].to(dtype))
        zero_point = rounded.zero_point[rows].to(zp_dtype)
        update_offload_parameter(linear, "weight_zero_point", zero_point)
        is_nearest = job.basis is Basis.NONE or bool(solution.is_nearest[index])
        loss = solution.loss[index, rows].sum().item()
        losses[linear] = None if is_nearest else loss / job.weight_sum
    return losses
