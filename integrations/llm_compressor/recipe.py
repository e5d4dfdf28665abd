"""Which modifiers may stand beside ours in a recipe, and what ours forgets of what they remove.

The host initializes all modifiers of a recipe before any of them sees data, then gives each a
calibration run of its own (``pipeline="independent"``, its default). So what comes before ours
changes the model after ours has looked at it, and what comes after would change quantized weights.
"""

from __future__ import annotations

from typing import Any

from compressed_tensors.utils import match_named_modules
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.gptq.base import GPTQModifier
from llmcompressor.modifiers.pruning.reap.base import REAPPruningModifier
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from llmcompressor.modifiers.transform.quip.base import QuIPModifier
from llmcompressor.modifiers.transform.smoothquant.base import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant.base import SpinQuantModifier
from llmcompressor.modifiers.transform.spinquant.mappings import SPINQUANT_MAPPING_REGISTRY
from torch import nn

from moeq_plugin.integrations.llm_compressor.host import running_oneshot
from moeq_plugin.models.moe import MoELayer

_BUDGETS = ("bits_per_weight", "size_gb", "allocation")
_ROTATE_INSTEAD = (
    "Use ResidualRotationModifier of moeq_plugin.integrations.llm_compressor, which is fused into "
    "the weights."
)


def check_stack(modifier: GPTQModifier, model: nn.Module, layers: list[MoELayer]) -> None:
    """Refuse a recipe whose modifiers would undo or miss each other's work.

    Args:
        modifier: ours, which is being initialized; those before it in the recipe have been.
        model: the model.
        layers: its MoE layers.

    Raises:
        ValueError: naming the modifier, why it does not work, and what does.
    """
    before, after = neighbours(modifier)
    name = type(modifier).__name__
    for other in after:
        if not isinstance(other, QuantizationMixin):
            raise ValueError(
                f"{type(other).__name__} comes after {name} in the recipe and would change weights "
                "that are quantized by then. Put it before."
            )
    calibrated = [
        m for m in before if m.requires_calibration_data and not isinstance(m, QuantizationMixin)
    ]
    running = running_oneshot()
    pipeline = running.dataset_args.pipeline if running is not None else None
    if calibrated and pipeline not in {None, "independent"}:
        raise ValueError(
            f"pipeline={pipeline!r} runs {type(calibrated[0]).__name__} and {name} in one pass, so "
            "Hessians would be those of the model before it. Leave `pipeline` out: each "
            "modifier gets a pass of its own."
        )
    if not layers:
        return
    for other in before:
        if isinstance(other, SpinQuantModifier):
            _check_spinquant(model)
        elif isinstance(other, QuIPModifier):
            raise ValueError(
                "QuIPModifier leaves a rotation of every linear's input to be done at run time, "
                f"which neither transformers nor vLLM do in experts. {_ROTATE_INSTEAD}"
            )
        elif isinstance(other, SmoothQuantModifier):
            _check_smoothquant(other, layers)
        elif isinstance(other, REAPPruningModifier):
            _check_schemes_survive(modifier, model, layers)


def neighbours(modifier: Modifier) -> tuple[list[Modifier], list[Modifier]]:
    """Return the modifiers before and after one in the recipe that runs."""
    recipe = active_session().lifecycle.recipe
    modifiers = list(recipe.modifiers) if recipe is not None else []
    for index, other in enumerate(modifiers):
        if other is modifier:
            return modifiers[:index], modifiers[index + 1 :]
    return [], []


def identity(modifier: Modifier) -> dict[str, Any]:
    """Return what the result depends on beside ``modifier``: the modifiers before it."""
    before, _ = neighbours(modifier)
    return {
        f"modifier {index} of the recipe": f"{type(other).__name__} {other.model_dump()}"
        for index, other in enumerate(before)
    }


def rename(model: nn.Module, *names: dict[nn.Module, str]) -> None:
    """Bring the names of modules up to date and drop modules that are gone, in place.

    REAP removes experts and renumbers those that stay.
    """
    current = {module: name for name, module in model.named_modules()}
    for of_then in names:
        of_now = {module: current[module] for module in of_then if module in current}
        of_then.clear()
        of_then.update(of_now)


def _check_spinquant(model: nn.Module) -> None:
    architecture = type(model).__name__
    if architecture not in SPINQUANT_MAPPING_REGISTRY:
        raise ValueError(
            f"SpinQuantModifier has no mapping for {architecture}: it would rotate experts and not "
            "the router that chooses among them, and center embeddings, so that the model computes "
            f"something else. {_ROTATE_INSTEAD}"
        )


def _check_smoothquant(modifier: SmoothQuantModifier, layers: list[MoELayer]) -> None:
    """Refuse a norm that is smoothed for experts and not for what else reads it.

    Raises:
        ValueError: naming the norm and the MoE block.
    """
    if not modifier.resolved_mappings_:
        raise ValueError(
            "SmoothQuantModifier found nothing to smooth in this model: give it `mappings`, or "
            "leave it out"
        )
    for mapping in modifier.resolved_mappings_:
        balanced = set(mapping.balance_layers)
        for layer in layers:
            if not balanced & set(layer.block.modules()):
                continue
            missing = [part for part in (layer.router, layer.shared_gate) if part is not None]
            if not balanced.issuperset(missing):
                raise ValueError(
                    f"SmoothQuantModifier would scale {mapping.smooth_name} and make up for it in "
                    f"the experts of {layer.name}, but not in their router or shared-expert gate, "
                    "so that tokens go to other experts. Give it mappings=[[[re:.*q_proj$, "
                    "re:.*k_proj$, re:.*v_proj$], re:.*input_layernorm$]]."
                )


def _check_schemes_survive(
    modifier: GPTQModifier, model: nn.Module, layers: list[MoELayer]
) -> None:
    """Refuse schemes that belong to single experts, which pruning removes and renumbers.

    Raises:
        ValueError: naming the request that cannot be met.
    """
    asked = [name for name in _BUDGETS if getattr(modifier, name, None) is not None]
    group_of: dict[nn.Module, str] = {}
    if not asked:
        for group, scheme in modifier.resolved_config.config_groups.items():
            matched = match_named_modules(model, scheme.targets, modifier.ignore)
            group_of.update((module, group) for _, module in matched)
    for layer in layers:
        experts = [layer.expert(index) for index in range(layer.num_experts)]
        for parts in zip(*(expert.children() for expert in experts), strict=True):
            if len({group_of.get(part) for part in parts}) > 1:
                asked.append(f"a scheme for some experts of {layer.name}")
    if asked:
        raise ValueError(
            f"{asked[0]} is decided with all experts there, and REAPPruningModifier would then "
            "remove some and renumber the others. Prune in a run of its own, save, and quantize "
            "the saved checkpoint."
        )
