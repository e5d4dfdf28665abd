"""Decoder layers: two norms, each read by what follows it alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from moeq_plugin.models.moe import MoELayer, UnsupportedModelError

NORM_NAMES = ("input_layernorm", "post_attention_layernorm")
_MLP_CHILDREN = ("experts", "down_proj")


@dataclass(frozen=True)
class Named:
    """A module and its name in the model."""

    name: str
    module: nn.Module

    def child(self, name: str) -> Named:
        """Return one of its children."""
        return Named(f"{self.name}.{name}", self.module.get_submodule(name))


@dataclass(frozen=True)
class DecoderLayer:
    """The parts of a decoder layer.

    Attributes:
        whole: the layer itself.
        attention_norm: read by the attention alone.
        attention: owns ``o_proj``.
        mlp_norm: read by the MLP or MoE block alone.
        mlp: the MLP or MoE block.
    """

    whole: Named
    attention_norm: Named
    attention: Named
    mlp_norm: Named
    mlp: Named


def decoder_layers(model: nn.Module, layers: list[MoELayer]) -> Iterator[DecoderLayer]:
    """Yield all decoder layers of the stack that holds the MoE layers, dense ones too.

    Args:
        model: the model.
        layers: its MoE layers.

    Raises:
        UnsupportedModelError: if a decoder layer has parts whose place is not known.
    """
    names: dict[str, None] = {}  # in order and once
    for layer in layers:
        name = layer.name.rpartition(".")[0]
        stack = name.rpartition(".")[0]
        if isinstance(model.get_submodule(stack), nn.ModuleList):
            members = model.get_submodule(stack).named_children()
            names.update(dict.fromkeys(f"{stack}.{index}" for index, _ in members))
        else:
            names[name] = None
    for name in names:
        yield _decoder_layer(name, model.get_submodule(name))


def all_decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """Return the decoder layers of a model in order of execution, of dense models too.

    Raises:
        UnsupportedModelError: if there are none, or one has parts whose place is not known.
    """
    stacks = [
        (name, stack)
        for name, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList)
        and any(hasattr(part, "o_proj") for layer in stack for part in layer.children())
    ]
    if not stacks:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no stack of layers with an attention module that has "
            "o_proj"
        )
    return [
        _decoder_layer(f"{name}.{index}", layer)
        for name, stack in stacks
        for index, layer in stack.named_children()
    ]


def _decoder_layer(name: str, module: nn.Module) -> DecoderLayer:
    children = dict(module.named_children())
    attention = [n for n, child in children.items() if hasattr(child, "o_proj")]
    mlp = [n for n, child in children.items() if any(hasattr(child, c) for c in _MLP_CHILDREN)]
    if len(attention) != 1 or len(mlp) != 1 or {*attention, *mlp, *NORM_NAMES} != set(children):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) consists of {', '.join(children)}; expected "
            f"{', '.join(NORM_NAMES)}, an attention module with o_proj and an MLP or MoE block, "
            "each norm read by what follows it alone. Pass `mappings` that hold for this "
            "architecture (llmcompressor.modifiers.transform.awq.AWQMapping)."
        )
    in_order = (NORM_NAMES[0], attention[0], NORM_NAMES[1], mlp[0])
    parts = (Named(f"{name}.{child}", children[child]) for child in in_order)
    return DecoderLayer(Named(name, module), *parts)
