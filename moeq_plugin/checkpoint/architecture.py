"""Which linears and other tensors a model has, as its config says, for the families we know.

Nothing is built: names and shapes follow from a dozen numbers. What a config of another family
describes is read off the file instead (:mod:`moeq_plugin.checkpoint.infer_architecture`), or off
the model, where whoever asks can build it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from moeq_plugin.core.small_linears import Kind


class Role(StrEnum):
    """What a linear does, as far as readers treat it differently."""

    ATTENTION = "attention"
    EXPERT = "expert"
    SHARED = "shared expert"
    DENSE = "dense MLP"
    ROUTER = "router"
    SHARED_GATE = "shared-expert gate"
    HEAD = "output embedding"
    TOWER = "tower or projector"
    STATE_GATE = Kind.STATE_GATE.value
    HEAD_GATE = Kind.HEAD_GATE.value
    INDEXER = Kind.INDEXER.value
    COMPRESSOR = Kind.COMPRESSOR.value
    HYPER_CONNECTION = Kind.HYPER_CONNECTION.value
    NORM = Kind.NORM.value
    PREDICTION = Kind.PREDICTION.value
    STATE_FACTOR = Kind.STATE_FACTOR.value
    OTHER = "other"


# what quantization leaves in 16 bit unless it is asked by name
KEPT = (Role.ROUTER, Role.SHARED_GATE, Role.HEAD, Role.TOWER, *map(Role, Kind))


@dataclass(frozen=True)
class Linear:
    """A matrix of the model.

    Attributes:
        name: canonical, see :mod:`moeq_plugin.core.names`.
        shape: ``(out, in)``.
        role: what it does.
        layer: number of its decoder layer, ``None`` outside of them.
        expert: number of its expert, ``None`` outside of routed experts.
        is_mtp: part of a next-token-prediction layer, which transformers does not load.
    """

    name: str
    shape: tuple[int, int]
    role: Role
    layer: int | None = None
    expert: int | None = None
    is_mtp: bool = False


@dataclass(frozen=True)
class Saved:
    """How ``save_pretrained`` writes a model with linear experts in 16 bit.

    Attributes:
        names: of linears in the file, by canonical name.
        tensors: dtype and shape of every tensor of the file, by its name there.
    """

    names: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Architecture:
    """A model as its config or its file describes it.

    Attributes:
        family: the config's model type.
        num_layers: decoder layers, without those for next-token prediction.
        num_mtp_layers: layers for next-token prediction that the config counts.
        num_experts: routed experts of a MoE layer.
        top_k: of which each token uses.
        num_shared: shared experts.
        moe_layers: numbers of the MoE layers.
        linears: by canonical name.
        others: shapes of all other tensors by canonical name; empty if they are not known.
        heads: attention heads for queries and for keys; ``None`` if they are not known.
        is_known: whether names and shapes come from the config.
        saved: how it is written, ``None`` unless the model was built to find out.
    """

    family: str
    num_layers: int
    num_mtp_layers: int
    num_experts: int
    top_k: int
    num_shared: int
    moe_layers: tuple[int, ...]
    linears: dict[str, Linear]
    others: dict[str, tuple[int, ...]] = field(default_factory=dict)
    heads: tuple[int, int] | None = None
    is_known: bool = True
    saved: Saved | None = None

    def experts(self) -> dict[int, list[Linear]]:
        """Return the linears of the routed experts of each layer."""
        found: dict[int, list[Linear]] = {}
        for linear in self.linears.values():
            if linear.role is Role.EXPERT and linear.layer is not None:
                found.setdefault(linear.layer, []).append(linear)
        return found
