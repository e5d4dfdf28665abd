"""Round linears to an option as they would be quantized, and leave them as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor.modifiers.quantization.calibration import initialize_observer, observe
from torch import nn

from moeq_plugin.core.codebook import CodebookFormat
from moeq_plugin.core.codebook_solver import solve_codebook
from moeq_plugin.core.solver_options import SolverOptions
from moeq_plugin.integrations.llm_compressor.allocation.options import Option
from moeq_plugin.integrations.llm_compressor.calibration.guard import guard
from moeq_plugin.integrations.llm_compressor.calibration.observations import (
    Calibration,
    Observation,
)
from moeq_plugin.integrations.llm_compressor.calibration.output_moments import OutputMoments
from moeq_plugin.integrations.llm_compressor.solving import Job, solve_stack, stacks
from moeq_plugin.records.run import Basis


@dataclass(frozen=True)
class GuardedMoments:
    """Linears that share second moments, which every option is tried with.

    Attributes:
        linears: the linears.
        hessian: ``[in, in]``, not starved; see :func:`guard`.
        weight_sum: what to divide a loss by for a mean over tokens.
        basis: what the second moments rest on.
        effective_tokens: of the linears' own tokens.
        outputs: what each of their outputs counts; ``None`` where all count alike and apart.
    """

    linears: Sequence[nn.Linear]
    hessian: torch.Tensor
    weight_sum: float
    basis: Basis
    effective_tokens: float
    outputs: OutputMoments | None

    def job(self, linears: list[nn.Linear], args: QuantizationArgs) -> Job:
        """Return what is solved to round some of the linears to one scheme."""
        outputs = self.outputs.of(linears) if self.outputs is not None else None
        tokens = self.effective_tokens
        return Job(linears, args, self.hessian, self.weight_sum, self.basis, tokens, outputs)


@dataclass(frozen=True)
class TrialRounding:
    """Rounds as MoEQuant does.

    Attributes:
        min_effective_tokens: as for quantization.
        shrinkage: as for quantization.
        solver: as for quantization.
        outputs: as for quantization.
        codebook_steps: ``refine_steps`` of :func:`moeq_plugin.core.codebook_solver.solve_codebook`.
    """

    min_effective_tokens: float | None
    shrinkage: float
    solver: SolverOptions
    outputs: OutputMoments | None = None
    codebook_steps: int = 8

    def guarded(self, observation: Observation, calibration: Calibration) -> GuardedMoments:
        """Return second moments that starve no expert.

        Args:
            observation: what the linears' own tokens gave.
            calibration: holds the sample of the layer's tokens.
        """
        hessian, weight_sum, basis = guard(
            observation,
            calibration,
            min_effective_tokens=self.min_effective_tokens,
            shrinkage=self.shrinkage,
            solver=self.solver,
        )
        effective_tokens = observation.moments.effective_tokens
        linears, outputs = observation.linears, self.outputs
        return GuardedMoments(linears, hessian, weight_sum, basis, effective_tokens, outputs)

    def differences(
        self, option: Option, moments: Sequence[GuardedMoments]
    ) -> Iterator[tuple[nn.Linear, torch.Tensor]]:
        """Yield what rounding changes of each linear that an option fits, ``[out, in]`` float32.

        Args:
            option: what to round to; nothing is yielded for 16 bits.
            moments: of all linears of a layer.
        """
        if option.codebook is not None:
            yield from self._encoded(option, option.codebook, moments)
        if option.scheme is None:
            return
        fitting = [[linear for linear in of.linears if option.fits(linear)] for of in moments]
        # the observers choose the scales, as they will for the option that is chosen in the end
        with _attached([linear for linears in fitting for linear in linears], option.scheme):
            jobs = [
                of.job(linears, option.scheme.weights)
                for of, linears in zip(moments, fitting, strict=True)
                if linears
            ]
            for stack in stacks(jobs, None, self.solver):
                rounded = solve_stack(stack, self.solver)
                for job, of_job in zip(stack, rounded, strict=True):
                    weights = of_job.weight.split([len(linear.weight) for linear in job.linears])
                    for linear, weight in zip(job.linears, weights, strict=True):
                        yield linear, weight.float() - linear.weight.float()

    def _encoded(
        self, option: Option, form: CodebookFormat, moments: Sequence[GuardedMoments]
    ) -> Iterator[tuple[nn.Linear, torch.Tensor]]:
        """Yield what a codebook changes of each linear, as :meth:`differences` does."""
        for of in moments:
            for linear in filter(option.fits, of.linears):
                solution = solve_codebook(
                    linear.weight,
                    of.hessian,
                    form,
                    dampening_frac=self.solver.dampening_frac,
                    refine_steps=self.codebook_steps,
                )
                yield linear, solution.weight.decode().float() - linear.weight.float()


@contextlib.contextmanager
def _attached(linears: Sequence[nn.Linear], scheme: QuantizationScheme) -> Iterator[None]:
    """Attach a scheme and weight observers that have seen their weights, and take them off."""
    # taken off in any case: who iterates above may stop before the end, and solving may fail
    with contextlib.ExitStack() as undo:
        for linear in linears:
            linear.quantization_scheme = scheme
            undo.callback(delattr, linear, "quantization_scheme")
            initialize_observer(linear, "weight")
            undo.callback(delattr, linear, "weight_observer")
            observe(linear, "weight")
        yield
