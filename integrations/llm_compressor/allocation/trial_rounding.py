"""Round linears to an option as they would be quantized, and leave them as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe
from torch import nn

from moeq_plugin.integrations.llm_compressor.allocation.options import Option
from moeq_plugin.integrations.llm_compressor.schemes import weight_args
from moeq_plugin.integrations.llm_compressor.solving import Job, solve_stack, stacks


def trial_rounding(
    option: Option, jobs: list[Job], *, block_size: int, dampening_frac: float
) -> Iterator[tuple[nn.Linear, torch.Tensor]]:
    """Yield what rounding to an option changes of each linear that it fits, ``[out, in]`` float32.

    Args:
        option: what to round to; not 16 bit.
        jobs: the linears of a layer with their second moments.
        block_size: as for quantization.
        dampening_frac: as for quantization.
    """
    fitting = [[linear for linear in job.linears if option.fits(linear)] for job in jobs]
    with _attached([linear for linears in fitting for linear in linears], option):
        of_option = [
            replace(job, linears=linears, args=weight_args(linears[0]))
            for job, linears in zip(jobs, fitting, strict=True)
            if linears
        ]
        for stack in stacks(of_option, None):
            rounded = solve_stack(stack, block_size=block_size, dampening_frac=dampening_frac)
            for job, of_job in zip(stack, rounded, strict=True):
                parts = of_job.weight.split([len(linear.weight) for linear in job.linears])
                for linear, weight in zip(job.linears, parts, strict=True):
                    yield linear, weight.float() - linear.weight.float()


@contextlib.contextmanager
def _attached(linears: list[nn.Linear], option: Option) -> Iterator[None]:
    """Attach a scheme and weight observers that have seen their weights, and take them off."""
    for linear in linears:
        linear.quantization_scheme = option.scheme
        initialize_observer(linear, "weight")
        observe(linear, "weight")
    try:
        yield
    finally:
        for linear in linears:
            del linear.quantization_scheme, linear.weight_observer
