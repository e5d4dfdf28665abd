"""Which scales AWQ may move from one module's output into the inputs of the next, by structure.

Every mapping that can be tried by itself is tried before it is used (``probes.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from llmcompressor.modifiers.transform.awq.mappings import ResolvedMapping
from llmcompressor.modifiers.utils.hooks import HooksMixin
from torch import nn

from moeq_plugin.integrations.llm_compressor.awq.probes import (
    commutes,
    reads_through,
    scales_with_weight,
)
from moeq_plugin.integrations.llm_compressor.schemes import weight_args
from moeq_plugin.models.moe import MoELayer, UnsupportedModelError

_NORMS = ("input_layernorm", "post_attention_layernorm")
# what an attention module may own beside the linears that read its input and o_proj
_BEHIND = {"q_b_proj": "q_a_layernorm", "kv_b_proj": "kv_a_layernorm"}
_HEAD_NORMS = ("q_norm", "k_norm")
_MLP_CHILDREN = ("experts", "down_proj")


@dataclass
class FoundMappings:
    """What can be smoothed and what cannot.

    Attributes:
        resolved: the host's description of each mapping, in order of execution.
        left_out: name of the module whose output is not scaled, and why.
    """

    resolved: list[ResolvedMapping] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def only_quantized(self) -> list[ResolvedMapping]:
        """Return the mappings into weights that have a scheme; note the others as left out."""
        kept = []
        for mapping in self.resolved:
            if any(weight_args(layer) is not None for layer in mapping.balance_layers):
                kept.append(mapping)
            else:
                self.left_out[mapping.smooth_name] = "what it feeds is not quantized"
        return kept


@dataclass(frozen=True)
class _Decoder:
    """A decoder layer: two norms, each followed by what reads it alone."""

    name: str
    norms: tuple[nn.Module, nn.Module]
    attention: tuple[str, nn.Module]
    mlp: tuple[str, nn.Module]


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
    found = FoundMappings()
    blocks = {layer.name: layer for layer in layers}
    with HooksMixin.disable_hooks():  # nobody observes what is only tried
        for decoder in _decoders(model, layers):
            _map_attention(found, decoder)
            _map_mlp(found, decoder, blocks.get(decoder.mlp[0]))
    return found


def _decoders(model: nn.Module, layers: list[MoELayer]) -> Iterator[_Decoder]:
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
        yield _decoder(name, model.get_submodule(name))


def _decoder(name: str, module: nn.Module) -> _Decoder:
    children = dict(module.named_children())
    attention = [n for n, child in children.items() if hasattr(child, "o_proj")]
    mlp = [n for n, child in children.items() if any(hasattr(child, c) for c in _MLP_CHILDREN)]
    if len(attention) != 1 or len(mlp) != 1 or {*attention, *mlp, *_NORMS} != set(children):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) consists of {', '.join(children)}; expected "
            f"{', '.join(_NORMS)}, an attention module with o_proj and an MLP or MoE block, each "
            "norm read by what follows it alone. Pass `mappings` that hold for this architecture "
            "(llmcompressor.modifiers.transform.awq.AWQMapping)."
        )
    return _Decoder(
        name=name,
        norms=(children[_NORMS[0]], children[_NORMS[1]]),
        attention=(f"{name}.{attention[0]}", children[attention[0]]),
        mlp=(f"{name}.{mlp[0]}", children[mlp[0]]),
    )


def _map_attention(found: FoundMappings, decoder: _Decoder) -> None:
    name, attention = decoder.attention
    children = dict(attention.named_children())
    norm_name = f"{decoder.name}.{_NORMS[0]}"
    readers = {
        n: child
        for n, child in children.items()
        if isinstance(child, nn.Linear) and n not in {*_BEHIND, "o_proj"}
    }
    known = {*readers, "o_proj", *_BEHIND, *_BEHIND.values(), *_HEAD_NORMS}
    unknown = [n for n, child in children.items() if n not in known and [*child.parameters()]]
    reason = f"{name}.{', '.join(unknown)} may read it too" if unknown else None
    _add_norm(found, norm_name, decoder.norms[0], name, attention, readers, reason)
    for linear, norm in _BEHIND.items():
        if linear in children and norm in children:
            reader = {linear: children[linear]}
            _add_norm(found, f"{name}.{norm}", children[norm], name, attention, reader)
    _add_values(found, name, children)


def _add_values(found: FoundMappings, name: str, children: dict[str, nn.Module]) -> None:
    """Add ``v_proj`` to ``o_proj``: attention is linear in the values, head by head."""
    v_proj, o_proj = children.get("v_proj"), children["o_proj"]
    if v_proj is None:
        if "kv_b_proj" in children:
            found.left_out[f"{name}.kv_b_proj -> o_proj"] = (
                "its features are keys and values of several heads, in turns"
            )
        return
    if v_proj.out_features != o_proj.in_features:
        found.left_out[f"{name}.v_proj"] = (
            f"grouped-query attention: {v_proj.out_features} features feed {o_proj.in_features}"
        )
        return
    found.resolved.append(_single(f"{name}.v_proj", v_proj, f"{name}.o_proj", o_proj))


def _map_mlp(found: FoundMappings, decoder: _Decoder, layer: MoELayer | None) -> None:
    name, mlp = decoder.mlp
    norm_name = f"{decoder.name}.{_NORMS[1]}"
    mlps = {name: mlp} if layer is None else _mlps_of(layer)
    readers = {
        f"{n}.{p}".removeprefix(f"{name}."): getattr(part, p)
        for n, part in mlps.items()
        for p in ("gate_proj", "up_proj")
        if hasattr(part, p)
    }
    if layer is not None:
        others = {layer.router, layer.shared_gate}
        readers.update((n, child) for n, child in mlp.named_children() if child in others)
    reason = None
    if not reads_through(mlp, list(readers.values())):
        reason = f"{name} does more to its input than multiply it with {len(readers)} weights"
    _add_norm(found, norm_name, decoder.norms[1], name, mlp, readers, reason)
    is_linear: dict[type, bool] = {}  # the experts of a layer are all of one kind
    for n, part in mlps.items():
        kind = type(part)
        if kind not in is_linear:
            is_linear[kind] = commutes(part)
        if is_linear[kind]:
            up_name, down_name = f"{n}.up_proj", f"{n}.down_proj"
            found.resolved.append(_single(up_name, part.up_proj, down_name, part.down_proj))
        else:
            found.left_out[f"{n}.up_proj"] = (
                f"what {kind.__name__} does between up_proj and down_proj (a clamp, an "
                "offset or a nonlinearity) does not commute with scaling"
            )


def _mlps_of(layer: MoELayer) -> dict[str, nn.Module]:
    mlps = {f"{layer.name}.experts.{i}": layer.expert(i) for i in range(layer.num_experts)}
    for name, child in layer.block.named_children():
        if child is layer.shared_expert:
            mlps[f"{layer.name}.{name}"] = child
    return mlps


def _single(up_name: str, up: nn.Module, down_name: str, down: nn.Module) -> ResolvedMapping:
    return ResolvedMapping(up_name, up, [down], [down_name], parent=down, parent_name=down_name)


def _add_norm(
    found: FoundMappings,
    norm_name: str,
    norm: nn.Module,
    parent_name: str,
    parent: nn.Module,
    readers: dict[str, nn.Module],
    reason: str | None = None,
) -> None:
    """Add a norm and all its readers, or say why not."""
    if not scales_with_weight(norm):
        reason = f"the output of {type(norm).__name__} is not proportional to its weight"
    elif any(reader.weight.shape[1] != len(norm.weight) for reader in readers.values()):
        reason = f"the widths of {', '.join(readers)} differ from the norm's"
    if reason is not None:
        found.left_out[norm_name] = reason
        return
    names = [f"{parent_name}.{reader}" for reader in readers]
    if len(readers) == 1:  # the host, too, judges a single linear by its own output
        (parent,), (parent_name,) = readers.values(), names
    # of a MoE block, the first expert's linear sees only the tokens routed to it
    watched = getattr(parent, "experts", None)
    found.resolved.append(
        ResolvedMapping(
            norm_name, norm, list(readers.values()), names, parent, parent_name, watched
        )
    )
