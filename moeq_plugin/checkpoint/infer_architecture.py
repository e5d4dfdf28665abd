"""Read an architecture off the tensors of a checkpoint whose family we do not know.

Linears are what has a matrix; the experts of a layer should be alike, so the shape that most of
them have is taken for all, and every layer with experts should have each of their projections.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from moeq_plugin.checkpoint.architecture import Architecture, Linear, Role
from moeq_plugin.checkpoint.config import (
    EXPERT_KEYS,
    PREDICTION_KEYS,
    SHARED_KEYS,
    TOP_K_KEYS,
    Config,
)
from moeq_plugin.checkpoint.headers import StoredTensor, read_bytes
from moeq_plugin.checkpoint.roles import is_embedding, role_of_linear
from moeq_plugin.core.names import expert_of, is_prediction, layer_of, pool_of

_Modules = Mapping[str, Mapping[str, StoredTensor]]

_IDLE_KEY = "zero_expert_num"


def infer_architecture(config: Config, modules: _Modules) -> Architecture:
    """Return what the tensors of a checkpoint amount to.

    Args:
        config: of the checkpoint.
        modules: tensors by module and suffix.

    Raises:
        ValueError: if a count in the config cannot be one.
    """
    num_experts = config.count(*EXPERT_KEYS, default=0, high=4096)
    # LongCat's router knows experts that give back what they get; no weight of theirs is used
    idle = range(num_experts, num_experts + config.count(_IDLE_KEY, default=0, high=4096))
    num_layers = config.count("num_hidden_layers", default=0, high=1024)
    found = (linear for linear in _found(modules, num_layers) if linear.expert not in idle)
    linears = {linear.name: linear for linear in found}
    linears |= _absent_experts(linears, num_experts)
    experts = [linear for linear in linears.values() if linear.role is Role.EXPERT]
    decoders = [linear for linear in linears.values() if not linear.is_mtp]
    layers = {linear.layer for linear in decoders if linear.layer is not None}
    return Architecture(
        family=config.family,
        num_layers=num_layers or len(layers),
        num_mtp_layers=config.count(*PREDICTION_KEYS, default=0, high=16),
        num_experts=num_experts or len({linear.expert for linear in experts}),
        top_k=config.count(*TOP_K_KEYS, default=0),
        num_shared=config.count(*SHARED_KEYS, default=0),
        moe_layers=tuple(
            sorted({e.layer for e in experts if e.layer is not None and not e.is_mtp})
        ),
        linears=linears,
        is_known=False,
    )


def _found(modules: _Modules, num_layers: int) -> Iterator[Linear]:
    shapes = {name: _shape(tensors) for name, tensors in modules.items() if not is_embedding(name)}
    common: dict[str, Counter[tuple[int, int]]] = {}
    for name, shape in shapes.items():
        if shape:
            common.setdefault(pool_of(name), Counter())[shape] += 1
    for name, shape in shapes.items():
        if shape:
            usual = common[pool_of(name)].most_common(1)[0][0]
            yield Linear(
                name, usual, role_of_linear(name), layer_of(name), expert_of(name),
                is_prediction(name, num_layers),
            )  # fmt: skip


def _shape(tensors: Mapping[str, StoredTensor]) -> tuple[int, int] | None:
    """Return ``(out, in)`` of the weight that these tensors are, ``None`` for no matrix."""
    stated = tensors.get("weight_shape")
    if stated is not None and stated.shape == (2,) and stated.is_whole and stated.dtype == "I64":
        rows, columns = struct.unpack("<2q", read_bytes(stated))
        return (rows, columns) if 0 < rows < 1 << 31 and 0 < columns < 1 << 31 else None
    if "g_idx" in tensors and "scales" in tensors and len(tensors["scales"].shape) == 2:
        return tensors["scales"].shape[1], tensors["g_idx"].num_bytes // 4
    shape = tensors["weight"].shape if "weight" in tensors else ()
    return (shape[0], shape[1]) if len(shape) == 2 and all(shape) else None


def _absent_experts(linears: Mapping[str, Linear], num_experts: int) -> dict[str, Linear]:
    """Return the experts that a layer would have if it were like its others.

    At most as many as there are: a config that asks for more is of another model, and a few bytes
    of it must not become millions of linears.
    """
    pools = {
        pool_of(linear.name): linear for linear in linears.values() if linear.expert is not None
    }
    most = sum(linear.expert is not None for linear in linears.values())
    absent: dict[str, Linear] = {}
    for linear in pools.values():
        before, after = linear.name.split(f".experts.{linear.expert}.", 1)
        for expert in range(num_experts):
            if len(absent) >= most:
                return absent
            name = f"{before}.experts.{expert}.{after}"
            if name not in linears:
                absent[name] = replace(linear, name=name, expert=expert)
    return absent
