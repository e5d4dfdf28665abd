"""What llama.cpp's converter does to the inputs of linears: other tensors, and another order.

Latent attention: ``kv_b_proj`` becomes two tensors. Values are made of the latent as before, with
heads as the experts of a matrix are; keys are multiplied into the queries, which are then what
comes in. Linear attention: heads of values that share a key lie side by side in transformers and
one round after the other in llama.cpp, and what is a single linear in Qwen3-Next becomes two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_KEYS, _VALUES = ".attn_k_b.weight", ".attn_v_b.weight"
_TOGETHER = "linear_attn.in_proj_qkvz"
_APART = (".attn_qkv.weight", ".attn_gate.weight")
_KEY_TYPE = "Q8_0"


@dataclass(frozen=True)
class Queries:
    """The linear whose outputs are what comes into the tensor of keys.

    Attributes:
        keys: the tensor of keys.
        values: the tensor of values, of the same linear.
        num_heads: of both.
        num_columns: of a head's queries that keys are multiplied with, before those that rotate.
    """

    keys: str
    values: str
    num_heads: int
    num_columns: int

    def mean_squares(
        self, weight: torch.Tensor, hessian: torch.Tensor, weight_sum: float
    ) -> torch.Tensor:
        """Return ``[heads, columns]`` mean squares of the queries.

        Args:
            weight: of the linear, ``[heads * outputs, in]``.
            hessian: ``[in, in]``, twice the weighted sum of outer products of its inputs.
            weight_sum: of the weights.
        """
        weight = weight.detach().to(hessian)
        squares = ((weight @ hessian) * weight).sum(1) / (2 * weight_sum or 1)
        return squares.view(self.num_heads, -1)[:, : self.num_columns]


@dataclass(frozen=True)
class Conversion:
    """What the converter does to a model's linears, all by the names of modules.

    Attributes:
        queries: those of latent attention.
        orders: linears whose columns it moves, with the column that comes to each place.
    """

    queries: Mapping[str, Queries] = field(default_factory=dict)
    orders: Mapping[str, torch.Tensor] = field(default_factory=dict)


def conversion_of(
    model: nn.Module, names: Mapping[nn.Linear, str], tensors: Mapping[str, str]
) -> Conversion:
    """Return what the converter does to these linears.

    Args:
        model: that they are in.
        names: of the linears.
        tensors: module name to llama.cpp's name of the tensor.
    """
    queries: dict[str, Queries] = {}
    orders: dict[str, torch.Tensor] = {}
    for name in names.values():
        parent: Any = model.get_submodule(name.rpartition(".")[0])  # sizes as each family has them
        if tensors[name].endswith(_VALUES):
            query = f"{name.rpartition('.')[0]}.{_makes_queries(parent)}"
            keys = tensors[name].replace(_VALUES, _KEYS)
            heads = int(parent.num_heads)
            queries[query] = Queries(keys, tensors[name], heads, int(parent.qk_nope_head_dim))
        elif name.endswith(".linear_attn.out_proj") and hasattr(parent, "in_proj_qkv"):
            shared = parent.num_v_heads // parent.num_k_heads
            places = torch.arange(parent.num_v_heads * parent.head_v_dim)
            grouped = places.view(parent.num_k_heads, shared, parent.head_v_dim)
            orders[name] = grouped.transpose(0, 1).flatten()
    return Conversion(queries, orders)


def _makes_queries(attention: nn.Module) -> str:
    return "q_proj" if getattr(attention, "q_b_proj", None) is None else "q_b_proj"


def with_parts(types: Mapping[str, str], tensors: Mapping[str, str]) -> dict[str, str]:
    """Return types with those of the tensors that the converter makes of one linear.

    Keys have other columns than the linear, which no type of wide blocks need fit.

    Args:
        types: of the tensors that linears are named after.
        tensors: module name to llama.cpp's name of the tensor.
    """
    found = dict(types)
    for module, tensor in tensors.items():
        if tensor.endswith(_VALUES):
            found[tensor.replace(_VALUES, _KEYS)] = _KEY_TYPE
        for part in parts_of(module, tensor):
            found[part] = types[tensor]
    return found


def parts_of(module: str, tensor: str) -> tuple[str, ...]:
    """Return the tensors of the same columns that the converter makes of a linear; often none.

    Args:
        module: name of the linear.
        tensor: that it is named after.
    """
    if not module.endswith(_TOGETHER):
        return ()
    layer = ".".join(tensor.split(".")[:2])
    return tuple(layer + part for part in _APART)
