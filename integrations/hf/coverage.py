"""How much of a model a request reaches, known before hours are spent on it.

Fused experts are no linears: a quantizer that looks for linears walks past them without a word,
and leaves most of a MoE model in 16 bit. Here they are made linears first, and every linear of the
decoder blocks that is neither reached nor ignored by name is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

from compressed_tensors.utils import match_named_modules
from torch import nn
from transformers import PreTrainedModel

from moeq_plugin.core.small_linears import small_kind
from moeq_plugin.integrations.llm_compressor import MoEQuantModifier
from moeq_plugin.models.moe import MoELayer, find_moe_layers

_SHOWN = 10


@dataclass(frozen=True)
class Coverage:
    """Parameters of the linears in a model's blocks; routers and shared-expert gates do not count.

    Attributes:
        total: all of them.
        reached: those that will be quantized.
        num_linears: how many linears that is.
        ignored: names of the linears left out by name.
    """

    total: int
    reached: int
    num_linears: int
    ignored: list[str]

    def __str__(self) -> str:
        share = 100 * self.reached / max(1, self.total)
        rest = f", {len(self.ignored)} linears ignored by name" if self.ignored else ""
        return f"{share:.2f} % of block parameters quantized ({self.num_linears} linears{rest})"


def check_coverage(model: PreTrainedModel, modifier: MoEQuantModifier) -> Coverage:
    """Return what a modifier would quantize of a linearized model.

    Args:
        model: linearized.
        modifier: not yet run.

    Raises:
        ValueError: listing the linears that it would neither quantize nor ignore by name.
    """
    linears = block_linears(model)
    reached = {module for _, module in match_named_modules(model, modifier.resolved_targets)}
    ignored = {module for _, module in match_named_modules(model, modifier.ignore)}
    missed = [n for n, module in linears.items() if module not in reached | ignored]
    missed += [f"{la.name}.experts (fused)" for la in find_moe_layers(model) if _is_fused(la)]
    if missed:
        more = f" and {len(missed) - _SHOWN} more" if len(missed) > _SHOWN else ""
        raise ValueError(
            f"{len(missed)} of {len(linears)} linears in the decoder blocks would stay in 16 bit: "
            f"{', '.join(missed[:_SHOWN])}{more}. Target them, or name them in `ignore`."
        )
    hit = [module for module in linears.values() if module in reached - ignored]
    return Coverage(
        total=sum(module.weight.numel() for module in linears.values()),
        reached=sum(module.weight.numel() for module in hit),
        num_linears=len(hit),
        ignored=[name for name, module in linears.items() if module in ignored],
    )


def block_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return the linears of a model by name, without those that stay in 16 bit by default."""
    kept = {model.get_output_embeddings()}
    for layer in find_moe_layers(model):
        for module in (layer.router, layer.shared_gate):
            kept |= set(module.modules()) if module is not None else set()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in kept and small_kind(name) is None
    }


def _is_fused(layer: MoELayer) -> bool:
    return not isinstance(layer.experts, nn.ModuleList)
