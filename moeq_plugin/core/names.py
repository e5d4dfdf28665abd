"""What the name of a module says: its layer, its expert, and what servers load together with it.

Every other part asks here, so that two of them cannot read one name in two ways. Strings only, and
the standard library only: what reads checkpoints and reports uses this where torch is not there.

The canonical name of a module is that of the linearized transformers model, such as
``model.layers.0.mlp.experts.3.gate_proj``. Mixtral's files and vLLM say ``block_sparse_moe`` for
the block and ``w1``, ``w3``, ``w2`` for an expert's projections.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# what servers load as one matrix, and hence in one scheme, by vLLM's name of that matrix
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
MIXTRAL_BLOCK = "block_sparse_moe"
MIXTRAL_PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

_FUSED_WITH = {part: parts for parts in FUSED.values() for part in parts}
_CANONICAL = {theirs: ours for ours, theirs in MIXTRAL_PROJECTIONS.items()}
_THEIRS = tuple(f".{theirs}" for theirs in _CANONICAL)
# Names come from files of strangers. A number of six digits or more is neither a layer nor an
# expert, and int() would refuse thousands of digits.
_LAYER = re.compile(r"(?P<before>(?:.*?\.)?)layers\.(?P<layer>[0-9]{1,5})\.(?P<rest>.+)", re.S)
_NUMBERED = re.compile(r"(?P<before>(?:.*?\.)?)(?P<layer>[0-9]{1,5})\.(?P<rest>.+)", re.S)
# what stands before the layers of a decoder, and never before those of a tower
_DECODERS = ("model.", "model.language_model.", "language_model.model.", "language_model.")
_EXPERT = re.compile(
    r"(?P<block>(?:.*?\.)?)experts\.(?P<expert>[0-9]{1,5})\.(?P<projection>.+)", re.S
)


@dataclass(frozen=True)
class InLayer:
    """A name taken apart at the number of its decoder layer.

    Attributes:
        before: what stands before ``layers``, with its dot; empty if nothing does.
        layer: number of the decoder layer.
        rest: the name within the layer.
    """

    before: str
    layer: int
    rest: str


@dataclass(frozen=True)
class OfExpert:
    """A name taken apart at the number of a routed expert.

    Attributes:
        block: what stands before ``experts``, without its dot; empty if nothing does.
        expert: number of the expert.
        projection: what follows, a projection or one of its tensors.
    """

    block: str
    expert: int
    projection: str


@dataclass(frozen=True)
class Place:
    """Where a linear belongs: what tables and charts are sorted by.

    Attributes:
        layer: number of the decoder layer, ``None`` outside of layers.
        expert: number of the routed expert, ``None`` for all others.
        kind: what is left of the name, the same in every layer and for every expert, such as
            ``self_attn.q_proj`` or ``experts.gate_proj``.
    """

    layer: int | None
    expert: int | None
    kind: str


def in_layer(name: str) -> InLayer | None:
    """Take a name apart at its decoder layer, ``None`` if it is outside of ``layers``.

    Example:
        >>> in_layer("model.layers.3.mlp.up_proj")
        InLayer(before='model.', layer=3, rest='mlp.up_proj')
    """
    found = _LAYER.fullmatch(name)
    return InLayer(found["before"], int(found["layer"]), found["rest"]) if found else None


def of_expert(name: str) -> OfExpert | None:
    """Take a name apart at its routed expert, ``None`` if it is outside of ``experts``.

    Example:
        >>> of_expert("mlp.experts.17.down_proj")
        OfExpert(block='mlp', expert=17, projection='down_proj')
    """
    found = _EXPERT.fullmatch(name)
    if found is None:
        return None
    return OfExpert(found["block"].removesuffix("."), int(found["expert"]), found["projection"])


def layer_of(name: str) -> int | None:
    """Return the number after ``layers``, ``None`` for what is in no decoder layer."""
    found = in_layer(name)
    return found.layer if found else None


def is_prediction(name: str, num_layers: int) -> bool:
    """Tell whether a tensor is of a layer for next-token prediction, which only servers load.

    Args:
        name: of the tensor.
        num_layers: decoder layers that the model has without them.

    Example:
        >>> is_prediction("model.layers.61.eh_proj.weight", 61), is_prediction("mtp.fc.weight", 48)
        (True, True)
        >>> is_prediction("vision_tower.encoder.layers.61.mlp.fc1.weight", 61)
        False
    """
    found = in_layer(name)
    is_behind = found is not None and found.before in _DECODERS and found.layer >= num_layers > 0
    return name.startswith("mtp.") or is_behind


def expert_of(name: str) -> int | None:
    """Return the number of the routed expert that a module belongs to."""
    found = of_expert(name)
    return found.expert if found else None


def place(name: str) -> Place:
    """Return where a linear of a model belongs.

    The first number in the name is the layer, whatever stands before it: RWKV's official names say
    ``blocks``, where :func:`layer_of` knows ``layers`` only.

    Example:
        >>> place("model.layers.3.mlp.experts.17.down_proj")
        Place(layer=3, expert=17, kind='experts.down_proj')
        >>> place("lm_head")
        Place(layer=None, expert=None, kind='lm_head')
    """
    found = _NUMBERED.fullmatch(name)
    if found is None:
        return Place(None, None, name)
    layer, expert = int(found["layer"]), of_expert(found["rest"])
    if expert is None:
        return Place(layer, None, found["rest"])
    return Place(layer, expert.expert, f"experts.{expert.projection}")


def pool_of(name: str) -> str:
    """Return the name without the number of an expert: linears with one role in one layer.

    Example:
        >>> pool_of("model.layers.3.mlp.experts.17.down_proj")
        'model.layers.3.mlp.experts.*.down_proj'
    """
    found = of_expert(name)
    if found is None:
        return name
    return ".".join(filter(None, (found.block, "experts.*", found.projection)))


def role_of(name: str) -> str:
    """Return the name without numbers: linears with one role in all layers.

    Example:
        >>> role_of("model.layers.3.mlp.experts.17.down_proj")
        'model.layers.*.mlp.experts.*.down_proj'
    """
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def fused_with(name: str) -> tuple[str, ...]:
    """Return the modules that servers load as one matrix with this one, itself among them.

    Some of them may not be there: a model without latent queries has no ``q_a_proj``.

    Example:
        >>> fused_with("mlp.up_proj"), fused_with("mlp.down_proj")
        (('mlp.gate_proj', 'mlp.up_proj'), ('mlp.down_proj',))
    """
    parent, dot, projection = name.rpartition(".")
    return tuple(f"{parent}{dot}{part}" for part in _FUSED_WITH.get(projection, (projection,)))


def canonical(name: str) -> str:
    """Return our name of a module or a tensor of a file; the inverse of :func:`mixtral`.

    Example:
        >>> canonical("model.layers.0.block_sparse_moe.experts.3.w1.weight")
        'model.layers.0.mlp.experts.3.gate_proj.weight'
    """
    if MIXTRAL_BLOCK not in name and not any(part in name for part in _THEIRS):
        return name  # nearly all names of nearly all files
    return _respelled(name, {MIXTRAL_BLOCK: "mlp"}, _CANONICAL)


def mixtral(name: str) -> str:
    """Return what Mixtral's files call the module or tensor of a canonical name.

    Example:
        >>> mixtral("model.layers.0.mlp.experts.3.gate_proj.weight")
        'model.layers.0.block_sparse_moe.experts.3.w1.weight'
    """
    return _respelled(name, {"mlp": MIXTRAL_BLOCK}, MIXTRAL_PROJECTIONS)


def _respelled(name: str, blocks: dict[str, str], projections: dict[str, str]) -> str:
    """Return the name with blocks, and the projection of an expert, spelled in another way."""
    found = of_expert(name)
    if found is not None:
        projection, dot, suffix = found.projection.partition(".")
        name = name.removesuffix(found.projection)
        name += projections.get(projection, projection) + dot + suffix
    return ".".join(blocks.get(part, part) for part in name.split("."))
