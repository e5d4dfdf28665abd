"""Make all experts of a model linears: ours where we know better, the host's for all others."""

from __future__ import annotations

from llmcompressor.modeling.moe.linearize import linearize_moe
from torch import nn
from transformers import PreTrainedModel

from moeq_plugin.integrations.llm_compressor.linearization.blocks import BLOCKS
from moeq_plugin.integrations.llm_compressor.linearization.own_experts import OwnExperts
from moeq_plugin.integrations.llm_compressor.linearization.stacks import stack_of
from moeq_plugin.models.moe import UnsupportedModelError

_REFUSED = {
    "Ernie4_5_VLMoeMoeExperts": "it has experts for images beside those for text, which text that "
    "calibrates does not reach",
    "DogeCDMoE": "its experts are rows of two embeddings and no linears",
    "DiffusionGemmaForBlockDiffusion": "it denoises a canvas beside the text that it has "
    "read, and text that calibrates has none",
}


def linearize(model: PreTrainedModel) -> PreTrainedModel:
    """Make the experts of a model linears, in place, and return it.

    Raises:
        UnsupportedModelError: if the experts of a block cannot be told apart.
    """
    linearize_own(model)
    linearize_moe(model)
    return model


def linearize_own(model: nn.Module) -> None:
    """Make linears of those experts that the host does not take apart, or not rightly.

    Raises:
        UnsupportedModelError: if the experts of a block cannot be told apart.
    """
    _refuse(model)
    for name, block in list(model.named_modules()):
        if type(block).__name__ in BLOCKS:
            model.set_submodule(name, BLOCKS[type(block).__name__](block))
    for name, experts in list(model.named_modules()):
        stack = stack_of(experts)
        if stack is not None:
            model.set_submodule(name, OwnExperts(experts, stack))


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        reason = _REFUSED.get(type(module).__name__)
        if reason is not None:
            where = f"{name} ({type(module).__name__})" if name else type(module).__name__
            raise UnsupportedModelError(f"{where} is not quantized: {reason}")
