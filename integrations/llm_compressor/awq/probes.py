"""Try whether a scale may be moved between modules, on the modules themselves.

Multiplying by powers of two is exact in floating point. So where moving a scale is legal every
bit of the output stays, and where it is not (a clamp, an offset behind the activation, a reader of
the input that was not found) the output changes. No tolerance has to tell one from the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from compressed_tensors.offload import update_offload_parameter
from torch import nn
from torch.utils._pytree import tree_leaves

from moeq_plugin.integrations.llm_compressor.schemes import weight_of

_MAGNITUDES = (1.0, 32.0, 1024.0)  # of inputs; the largest reach every clamp


def scales_with_weight(norm: nn.Module) -> bool:
    """Tell whether a norm's output is proportional to its weight and bias.

    It is not for norms that multiply by ``1 + weight``.

    Args:
        norm: has a ``weight`` of ``[hidden]``.
    """
    weight, bias = weight_of(norm), _bias_of(norm)
    factors, rows = _powers_of_two(weight, len(weight)), _rows(weight, len(weight))
    expected = norm(rows) * factors
    changes = [(norm, "weight", weight * factors)]
    if bias is not None:
        changes.append((norm, "bias", bias * factors))
    with _changed(changes):
        return torch.equal(norm(rows), expected)


def reads_through(block: nn.Module, readers: list[nn.Module]) -> bool:
    """Tell whether multiplying with these weights is all that a block does to its input.

    Args:
        block: an MLP or MoE block, called with ``[batch, tokens, hidden]``.
        readers: modules in it with a ``weight`` of ``[out, hidden]``.
    """
    weight = weight_of(readers[0])
    num_channels = weight.shape[1]
    if any(weight_of(reader).shape[1] != num_channels for reader in readers):
        return False
    factors, rows = _powers_of_two(weight, num_channels), _rows(weight, num_channels)
    expected = block(rows[None])
    with _changed([(reader, "weight", weight_of(reader) * factors) for reader in readers]):
        return _same(block(rows[None] / factors), expected)


def commutes(mlp: nn.Module) -> bool:
    """Tell whether scaling the rows of ``up_proj`` equals scaling the columns of ``down_proj``.

    Args:
        mlp: has both, and whatever it likes between them.
    """
    up, down = mlp.get_submodule("up_proj"), mlp.get_submodule("down_proj")
    weight, bias = weight_of(up), _bias_of(up)
    factors = _powers_of_two(weight, len(weight))
    rows = _rows(weight, weight.shape[1])
    inputs = [rows * magnitude for magnitude in _MAGNITUDES]
    expected = [mlp(rows) for rows in inputs]
    changes = [
        (up, "weight", weight / factors[:, None]),
        (down, "weight", weight_of(down) * factors),
    ]
    if bias is not None:
        changes.append((up, "bias", bias / factors))
    with _changed(changes):
        return all(_same(mlp(x), y) for x, y in zip(inputs, expected, strict=True))


def _same(first: object, second: object) -> bool:
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


@contextmanager
def _changed(changes: list[tuple[nn.Module, str, torch.Tensor]]) -> Iterator[None]:
    """Put values into parameters, given as module, name and value, for a while."""
    originals = [(module, name, getattr(module, name).clone()) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            update_offload_parameter(module, name, value)
        yield
    finally:
        for module, name, value in originals:
            update_offload_parameter(module, name, value)


def _bias_of(module: nn.Module) -> torch.Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, torch.Tensor) else None


def _powers_of_two(weight: torch.Tensor, num_channels: int) -> torch.Tensor:
    exponents = torch.randint(-2, 3, (num_channels,), generator=torch.Generator().manual_seed(0))
    return torch.ldexp(torch.ones(num_channels), exponents).to(weight)


def _rows(weight: torch.Tensor, num_channels: int) -> torch.Tensor:
    rows = torch.randn(8, num_channels, generator=torch.Generator().manual_seed(1))
    return rows.to(weight)
