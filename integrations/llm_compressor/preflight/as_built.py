"""What quantization finds in a model of any family: built without weights, its experts linearized.

Names and shapes then come from where the run takes them, and not from rules about families: which
matrices are linears, how fused experts come apart, what stays in 16 bit, what files call it all.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from llmcompressor.modeling.moe.conversion_mappings import set_save_conversion_mapping
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_non_linearized_moes
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moeq_plugin.checkpoint.architecture import KEPT, Architecture, Linear, Role, Saved
from moeq_plugin.checkpoint.config import SHARED_KEYS, TOP_K_KEYS
from moeq_plugin.checkpoint.open_checkpoint import Checkpoint
from moeq_plugin.checkpoint.roles import role_of_linear
from moeq_plugin.core.names import canonical, expert_of, place
from moeq_plugin.integrations.llm_compressor.checkpoint.file_names import (
    module_renamed,
    saving_renamings,
    saving_rules,
)
from moeq_plugin.integrations.llm_compressor.host import quiet
from moeq_plugin.integrations.llm_compressor.linearization import linearize_own
from moeq_plugin.integrations.llm_compressor.preflight.model import check_cut
from moeq_plugin.integrations.llm_compressor.preflight.targets import kept_by_default
from moeq_plugin.models.auto_class import language_class_of
from moeq_plugin.models.linear_experts import linear_moe_layers
from moeq_plugin.models.moe import MoELayer, find_moe_layers
from moeq_plugin.untrusted.reading import check_model

_DTYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64",
    torch.int32: "I32", torch.bool: "BOOL",
}  # fmt: skip
_TORCH = {name: dtype for dtype, name in _DTYPES.items() if dtype.is_floating_point}


def build_architecture(checkpoint: Checkpoint) -> Architecture:
    """Return what quantizing all linears would be about.

    Args:
        checkpoint: the 16-bit model; none of its code is run.

    Raises:
        ValueError: if transformers cannot build the model, or it could not be quantized.
    """
    model = _built(checkpoint)
    check_cut(model)
    layers = linear_moe_layers(model)
    config: Any = model.config.get_text_config()
    rules = saving_renamings(model)
    # many routers are matrices of a class of their own, which a target `Linear` does not mean
    routers = {m for layer in layers if layer.router for m in layer.router.modules()}
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (module in routers and _is_matrix(module))
    }
    names = {name: canonical(module_renamed(name, rules)) for name in modules}
    kept = {name: Role.ROUTER.value for name, module in modules.items() if module in routers}
    kept |= kept_by_default(model, layers, ("Linear",))
    linears = [_linear(names[name], module, kept.get(name)) for name, module in modules.items()]
    moe_layers = (place(f"{layer.name}.experts").layer for layer in layers)
    return Architecture(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        num_mtp_layers=0,
        num_experts=max((_num_matrices(layer) for layer in layers), default=0),
        top_k=_first(config, TOP_K_KEYS),
        num_shared=_first(config, SHARED_KEYS) or int(any(la.shared_expert for la in layers)),
        moe_layers=tuple(dict.fromkeys(number for number in moe_layers if number is not None)),
        linears={linear.name: linear for linear in linears},
        is_known=False,
        saved=Saved({names[n]: module_renamed(n, rules) for n in modules}, _tensors(model)),
    )


def _built(checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the model without weights, its experts linearized as a run would.

    Raises:
        ValueError: if transformers cannot build it.
    """
    directory = checkpoint.directory
    check_model(directory)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    stored = next((t.dtype for t in checkpoint.tensors.values() if t.dtype in _TORCH), "F32")
    auto = language_class_of(config)
    with torch.device("meta"), quiet():
        try:
            model: PreTrainedModel = auto.from_config(
                config, dtype=config.dtype or _TORCH[stored], trust_remote_code=False
            )
        except Exception as error:  # configs of strangers fail in every way there is
            raise ValueError(f"transformers cannot build {config.model_type}: {error}") from error
        linearize_own(model)
        find_moe_layers(model)  # it refuses what must not be linearized
        for name, experts in get_non_linearized_moes(model):
            model.set_submodule(name, _linearized(name, experts, model.config))
    return model


def _linearized(name: str, experts: nn.Module, config: Any) -> nn.Module:
    """Return what linearize_moe makes of experts, which also copies weights, and there are none.

    Raises:
        ValueError: if it cannot, as where experts of one layer are not of one width.
    """
    try:
        linear = LinearExperts2D.get_linear_experts_cls(type(experts))  # type: ignore[arg-type]
        return linear(getattr(experts, "config", config))
    except Exception as error:  # it reads configs that it does not know
        raise ValueError(
            f"llm-compressor does not take the experts of this model apart ({name}, "
            f"{type(experts).__name__}): {error}"
        ) from error


def _num_matrices(layer: MoELayer) -> int:
    """Return how many experts have weights: some families have idle ones beside them."""
    experts = (layer.expert(index).modules() for index in range(layer.num_experts))
    return sum(any(isinstance(module, nn.Linear) for module in expert) for expert in experts)


def _is_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2


def _linear(name: str, module: nn.Module, kept: str | None) -> Linear:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)  # a linear has one
    role = role_of_linear(name) if kept is None else Role(kept)
    if kept is None and role in KEPT:  # called like one, but rounded like all others
        role = Role.OTHER
    shape = (weight.shape[0], weight.shape[1])
    if role is Role.TOWER:  # whose layers are none of the decoder's
        return Linear(name, shape, role)
    return Linear(name, shape, role, place(name).layer, expert_of(name))


def _tensors(model: PreTrainedModel) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of what saving writes, by the file's names."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    wide = list(model._keep_in_fp32_modules_strict or ())
    if model.dtype == torch.float16:
        wide += model._keep_in_fp32_modules or ()
    for name, tensor in state.items():
        if tensor.is_floating_point() and any(re.search(part, name) for part in wide):
            state[name] = tensor.float()
    set_save_conversion_mapping(model, saving_rules(model))
    saved = revert_weight_conversion(model, state)
    return {name: (_DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in saved.items()}


def _first(config: Any, keys: tuple[str, ...]) -> int:
    """Return the first number that a config has under one of these keys."""
    parts = (config, getattr(config, "ffn_config", None))  # DBRX's experts have one of their own
    found = (getattr(part, key, None) for part in parts for key in keys)
    return next((value for value in found if isinstance(value, int)), 0)
