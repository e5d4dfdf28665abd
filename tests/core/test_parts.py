import pytest
import torch

from moeq_plugin.core.parts import parts, row_parts

SHAPES = [(1, 1, 1), (3, 7, 5), (4, 2, 64), (1, 50, 8)]


@pytest.mark.parametrize("in_cache", [1, 5, 40, 300, 10**6])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_of_every_expert_comes_once_and_parts_are_no_larger_than_asked(shape, in_cache):
    seen, stack = torch.zeros(shape[:2]), torch.empty(shape)
    for experts, rows in parts(stack, in_cache):
        seen[experts, rows] += 1
        part = stack[experts, rows]
        assert part.numel() <= in_cache or part.shape[:2] == (1, 1)
    assert (seen == 1).all()


@pytest.mark.parametrize("in_cache", [1, 5, 40, 300, 10**6])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_comes_once_with_all_experts(shape, in_cache):
    seen, stack = torch.zeros(shape[1]), torch.empty(shape)
    for rows in row_parts(stack, in_cache):
        seen[rows] += 1
        part = stack[:, rows]
        assert part.numel() <= in_cache or part.shape[1] == 1
    assert (seen == 1).all()


def test_an_accelerator_is_given_more_than_a_cache_holds():
    stack = torch.empty(8, 128, 256, device="meta")
    assert len(list(parts(stack, 1))) == 1
    assert len(list(row_parts(stack, 1))) == 1
