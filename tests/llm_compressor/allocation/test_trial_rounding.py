"""A trial changes nothing, whether it is finished or given up."""

import pytest
import torch

pytest.importorskip("llmcompressor")

from moeq_plugin.core.codebook_solver import solve_codebook
from moeq_plugin.core.solver_options import SolverOptions
from moeq_plugin.integrations.llm_compressor.allocation.options import parse_option
from moeq_plugin.integrations.llm_compressor.allocation.trial_rounding import (
    GuardedMoments,
    TrialRounding,
)
from moeq_plugin.records.run import Basis

ROUNDING = TrialRounding(min_effective_tokens=None, shrinkage=1.0, solver=SolverOptions())


def moments(*columns):
    torch.manual_seed(0)
    return [
        GuardedMoments(
            [torch.nn.Linear(of, 8, bias=False)], torch.eye(of), 1.0, Basis.OWN, 64.0, None
        )
        for of in columns
    ]


def linears(of):
    return [linear for members in of for linear in members.linears]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_linears_are_left_as_they_were(steps):
    tried = moments(32, 64, 32)
    weights = [linear.weight.detach().clone() for linear in linears(tried)]

    trial = ROUNDING.differences(parse_option("W4A16_G32"), tried)
    for _ in range(steps):
        next(trial)
    trial.close()

    for linear, weight in zip(linears(tried), weights, strict=True):
        assert torch.equal(linear.weight, weight)
        assert not hasattr(linear, "quantization_scheme")
        assert not hasattr(linear, "weight_observer")


def test_only_what_an_option_fits_is_rounded():
    tried = moments(32, 24, 64)
    rounded = {linear for linear, _ in ROUNDING.differences(parse_option("W4A16_G32"), tried)}
    assert rounded == {linears(tried)[0], linears(tried)[2]}


def test_sixteen_bits_round_nothing():
    assert list(ROUNDING.differences(parse_option("UNQUANTIZED"), moments(32))) == []


def test_without_correlations_the_change_is_within_half_a_step():
    """With an identity for a Hessian no column makes up for another: rounding to nearest."""
    tried = moments(32)
    (linear,) = linears(tried)
    ((_, difference),) = ROUNDING.differences(parse_option("W4A16_G32"), tried)
    step = 2 * linear.weight.abs().amax(1, keepdim=True) / 15  # symmetric 4 bit, one group
    assert (difference.abs() <= step / 2 * 1.001).all()  # scales are rounded too
    assert difference.any()


def test_a_codebook_is_tried_as_it_is_made():
    tried = moments(32, 64)
    tried[1].hessian.copy_(torch.randn(64, 96).cov() + torch.eye(64))
    option = parse_option("CB3D2_G8x32")
    found = dict(ROUNDING.differences(option, tried))
    for of in tried:
        (linear,) = of.linears
        made = solve_codebook(linear.weight, of.hessian.clone(), option.codebook)
        torch.testing.assert_close(linear.weight + found[linear], made.weight.decode())


def test_only_where_its_vectors_fit():
    tried = moments(32, 6, 64)
    rounded = {linear for linear, _ in ROUNDING.differences(parse_option("CB3D4_G8x32"), tried)}
    assert rounded == {linears(tried)[0], linears(tried)[2]}
