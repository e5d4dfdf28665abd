"""Smoothing tiny models, and the same by brute force in float64."""

import torch
from compressed_tensors.quantization import disable_quantization
from helpers import int4, oneshot, tiny_model
from llmcompressor.modifiers.quantization import QuantizationModifier

from moeq_plugin import MoEQuantAWQModifier
from moeq_plugin.models.moe import find_moe_layers

KEPT = ["lm_head", "re:.*gate$", "re:.*router$"]


def uneven_model(family, directory, **changes):
    """Make a tiny model whose channels differ in size, as those of trained models do."""
    model = tiny_model(family, directory, **changes)
    rng = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data *= torch.exp(torch.randn(parameter.shape, generator=rng))
    return model


def rounding(*, symmetric=True):
    return QuantizationModifier(config_groups=int4(16, symmetric=symmetric), ignore=KEPT)


def smooth(model, data=None, *, symmetric=True, pipeline="independent", **arguments):
    """Smooth ``model`` for 4 bits and leave its weights unrounded; return the modifier's record."""
    modifier = Spy(**{"n_grid": 5, **arguments})
    recipe = [modifier, rounding(symmetric=symmetric)]
    oneshot(model, recipe, data, pipeline=pipeline)
    model.apply(disable_quantization)
    return modifier.record


def starve(model, allowed):
    """Make every router of ``model`` choose among the experts in ``allowed`` only."""
    for layer in find_moe_layers(model):

        def reroute(_module, _args, output, layer=layer):
            logits, weights, index = output
            return logits, weights, torch.tensor(allowed)[index % len(allowed)]

        layer.router.register_forward_hook(reroute)


class Spy(MoEQuantAWQModifier):
    """Keeps what the experts of the first MoE layer are called with, before anything is scaled.

    From within: traced by the host, the model can lose its causal mask and route differently.
    """

    def on_calibration_start(self, state, event, **kwargs):
        super().on_calibration_start(state, event, **kwargs)
        calls.clear()
        (layer, *_) = find_moe_layers(state.model)
        self.register_hook(layer.experts, lambda _m, args: calls.append(args[:3]), "forward_pre")

    def on_calibration_end(self, state, event, **kwargs):
        super().on_calibration_end(state, event, **kwargs)
        self.remove_hooks()


calls: list[tuple[torch.Tensor, ...]] = []


@torch.no_grad()
def inputs_of(expert, index, projection, *, factors=1.0, all_tokens=False):
    """Return what a linear of an expert receives and its combine weights, in float64.

    ``factors`` [hidden] is what smoothing the norm has done to the experts' inputs since.
    """
    rows, weights = [], []
    for hidden, of_slots, combine in calls:
        for token, experts in enumerate(of_slots.tolist()):
            if all_tokens or index in experts:
                rows.append(hidden[token] * factors)
                weights.append(1.0 if all_tokens else combine[token, experts.index(index)].item())
    rows = torch.stack(rows)
    if projection == "down_proj":
        rows = torch.nn.functional.silu(expert.gate_proj(rows)) * expert.up_proj(rows)
    return rows.double(), torch.tensor(weights, dtype=torch.float64)


def candidates(down, rows, magnitude):
    """Yield the scales that a search of 20 steps tries, and what each changes."""
    for step in range(20):
        scales = magnitude.float() ** (step / 19)
        scales = scales / (scales.max() * scales.min()).sqrt()
        yield scales, rounded(down * scales) / scales - down


def rounded(weight, group_size=16):
    """Round to nearest on the 4-bit asymmetric grid; the ends of the symmetric one are ties."""
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high.clamp(min=0) - low.clamp(max=0)) / 15
    zero = (-8 - low.clamp(max=0) / scale).round()
    return (((groups / scale + zero).round().clamp(-8, 7) - zero) * scale).flatten(1)


def weighted_loss(change, inputs, token_weights):
    return (token_weights * (inputs @ change.double().T).square().sum(1)).sum().item()


SEARCH = {"n_grid": 20, "duo_scaling": False, "symmetric": False}


def linearized(*arguments, **changes):
    model = tiny_model(*arguments, **changes)
    oneshot(model, rounding())
    return model.apply(disable_quantization)
