"""Which scales AWQ may move from one module's output into the inputs of the next, by structure.

Every mapping that can be tried by itself is tried before it is used (``probes.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from llmcompressor.modifiers.transform.awq.mappings import ResolvedMapping
from llmcompressor.modifiers.utils.hooks import HooksMixin
from torch import nn

from moeq_plugin.integrations.llm_compressor.awq.probes import (
    commutes,
    reads_through,
    scales_with_weight,
)
from moeq_plugin.integrations.llm_compressor.schemes import weight_args, weight_of
from moeq_plugin.models.decoders import (
    DecoderLayer,
    Named,
    decoder_layers,
)
from moeq_plugin.models.moe import MoELayer

# what an attention module may own beside the linears that read its input and o_proj
_BEHIND = {"q_b_proj": "q_a_layernorm", "kv_b_proj": "kv_a_layernorm"}
_HEAD_NORMS = ("q_norm", "k_norm")


@dataclass(frozen=True)
class FoundMappings:
    """What can be smoothed and what cannot.

    Attributes:
        resolved: the host's description of each mapping, in order of execution.
        left_out: name of the module whose output is not scaled, and why.
    """

    resolved: tuple[ResolvedMapping, ...]
    left_out: Mapping[str, str]

    def only_quantized(self) -> FoundMappings:
        """Return the mappings into weights that have a scheme; the others are left out."""
        kept = tuple(mapping for mapping in self.resolved if _feeds_quantized(mapping))
        reasons = {
            mapping.smooth_name: "what it feeds is not quantized"
            for mapping in self.resolved
            if not _feeds_quantized(mapping)
        }
        return FoundMappings(kept, {**self.left_out, **reasons})


@dataclass(frozen=True)
class _LeftOut:
    """A module whose output is not scaled."""

    name: str
    reason: str


_Found = ResolvedMapping | _LeftOut


def judged_alone(mapping: ResolvedMapping) -> nn.Linear | None:
    """Return the one linear whose own output is the loss, ``None`` if a block's output is."""
    (first, *others) = mapping.balance_layers
    is_alone = not others and mapping.parent is first
    return first if is_alone and isinstance(first, nn.Linear) else None


@torch.no_grad()
def find_mappings(model: nn.Module, layers: list[MoELayer]) -> FoundMappings:
    """Return all mappings of the decoder stack that holds the MoE layers; weights stay as they are.

    Per decoder layer: the norm before attention into everything that reads it; DeepSeek's inner
    norms; ``v_proj`` into ``o_proj`` where their features correspond; the norm before a MoE block
    into gate and up of all experts, the shared expert, its gate and the router *together*; and
    ``up_proj`` into ``down_proj`` of each expert, shared expert and dense MLP.

    Args:
        model: the model, experts linearized.
        layers: its MoE layers.

    Raises:
        UnsupportedModelError: if a decoder layer has parts whose place is not known.
    """
    blocks = {layer.name: layer for layer in layers}
    found: list[_Found] = []
    with HooksMixin.disable_hooks():  # nobody observes what is only tried
        for decoder in decoder_layers(model, layers):
            found += _of_attention(decoder)
            found += _of_mlp(decoder, blocks.get(decoder.mlp.name))
    return FoundMappings(
        resolved=tuple(one for one in found if isinstance(one, ResolvedMapping)),
        left_out={one.name: one.reason for one in found if isinstance(one, _LeftOut)},
    )


def _of_attention(decoder: DecoderLayer) -> Iterator[_Found]:
    attention = decoder.attention
    children = dict(attention.module.named_children())
    readers: dict[str, nn.Module] = {
        n: child
        for n, child in children.items()
        if isinstance(child, nn.Linear) and n not in {*_BEHIND, "o_proj"}
    }
    known = {*readers, "o_proj", *_BEHIND, *_BEHIND.values(), *_HEAD_NORMS}
    unknown = [n for n, child in children.items() if n not in known and [*child.parameters()]]
    reason = f"{attention.name}.{', '.join(unknown)} may read it too" if unknown else None
    yield _of_norm(decoder.attention_norm, attention, readers, reason)
    for linear, norm in _BEHIND.items():
        if linear in children and norm in children:
            inner = Named(f"{attention.name}.{norm}", children[norm])
            yield _of_norm(inner, attention, {linear: children[linear]})
    yield from _of_values(attention.name, children)


def _of_values(name: str, children: dict[str, nn.Module]) -> Iterator[_Found]:
    """Yield ``v_proj`` to ``o_proj``: attention is linear in the values, head by head."""
    v_proj, o_proj = children.get("v_proj"), children["o_proj"]
    if v_proj is None:
        if "kv_b_proj" in children:
            yield _LeftOut(
                f"{name}.kv_b_proj -> o_proj",
                "its features are keys and values of several heads, in turns",
            )
        return
    num_values, num_read = len(weight_of(v_proj)), weight_of(o_proj).shape[1]
    if num_values != num_read:
        reason = f"grouped-query attention: {num_values} features feed {num_read}"
        yield _LeftOut(f"{name}.v_proj", reason)
        return
    yield _of_linears(Named(f"{name}.v_proj", v_proj), Named(f"{name}.o_proj", o_proj))


def _of_mlp(decoder: DecoderLayer, layer: MoELayer | None) -> Iterator[_Found]:
    mlp = decoder.mlp
    mlps = [mlp] if layer is None else _mlps_of(layer)
    readers = {
        part.child(p).name.removeprefix(f"{mlp.name}."): part.child(p).module
        for part in mlps
        for p in ("gate_proj", "up_proj")
        if hasattr(part.module, p)
    }
    if layer is not None:
        readers.update(_routers_of(layer))
    reason = None
    if not reads_through(mlp.module, list(readers.values())):
        reason = f"{mlp.name} does more to its input than multiply it with {len(readers)} weights"
    yield _of_norm(decoder.mlp_norm, mlp, readers, reason)
    is_linear: dict[type, bool] = {}  # the experts of a layer are all of one kind
    for part in mlps:
        kind = type(part.module)
        if kind not in is_linear:
            is_linear[kind] = commutes(part.module)
        up, down = (
            Named(f"{part.name}.{p}", part.module.get_submodule(p))
            for p in ("up_proj", "down_proj")
        )
        if is_linear[kind]:
            yield _of_linears(up, down)
        else:
            yield _LeftOut(
                up.name,
                f"what {kind.__name__} does between up_proj and down_proj (a clamp, an "
                "offset or a nonlinearity) does not commute with scaling",
            )


def _routers_of(layer: MoELayer) -> Iterator[tuple[str, nn.Module]]:
    """Yield the matrices that a router or a gate consists of, by their names in the block."""
    for name, child in layer.block.named_children():
        for inner, module in child.named_modules() if child in _gates(layer) else ():
            weight = module._parameters.get("weight")
            if weight is not None and weight.ndim > 1:
                yield f"{name}.{inner}".rstrip("."), module


def _gates(layer: MoELayer) -> set[nn.Module | None]:
    return {layer.router, layer.shared_gate}


def _mlps_of(layer: MoELayer) -> list[Named]:
    mlps = [Named(f"{layer.name}.experts.{i}", layer.expert(i)) for i in range(layer.num_experts)]
    children = layer.block.named_children()
    shared = [(name, child) for name, child in children if child is layer.shared_expert]
    return mlps + [Named(f"{layer.name}.{name}", child) for name, child in shared]


def _of_linears(up: Named, down: Named) -> ResolvedMapping:
    return ResolvedMapping(
        smooth_name=up.name,
        smooth_layer=up.module,
        balance_layers=[down.module],
        balance_names=[down.name],
        parent=down.module,
        parent_name=down.name,
    )


def _of_norm(
    norm: Named, parent: Named, readers: dict[str, nn.Module], reason: str | None = None
) -> _Found:
    """Return a norm with all its readers, by their names in ``parent``, or why not."""
    if not isinstance(getattr(norm.module, "weight", None), torch.Tensor):
        return _LeftOut(norm.name, f"{type(norm.module).__name__} has no weight of its own")
    weight = weight_of(norm.module)
    if not scales_with_weight(norm.module):
        kind = type(norm.module).__name__
        reason = f"the output of {kind} is not proportional to its weight"
    elif any(weight_of(reader).shape[1] != len(weight) for reader in readers.values()):
        reason = f"the widths of {', '.join(readers)} differ from the norm's"
    if reason is not None:
        return _LeftOut(norm.name, reason)
    names = [f"{parent.name}.{reader}" for reader in readers]
    if len(readers) == 1:  # the host, too, judges a single linear by its own output
        parent = Named(names[0], *readers.values())
    return ResolvedMapping(
        smooth_name=norm.name,
        smooth_layer=norm.module,
        balance_layers=list(readers.values()),
        balance_names=names,
        parent=parent.module,
        parent_name=parent.name,
        # of a MoE block, the first expert's linear sees only the tokens routed to it
        activation_hook_target=getattr(parent.module, "experts", None),
    )


def _feeds_quantized(mapping: ResolvedMapping) -> bool:
    return any(weight_args(layer) is not None for layer in mapping.balance_layers)
