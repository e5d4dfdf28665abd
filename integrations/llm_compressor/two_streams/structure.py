"""Whether a decoder layer computes what its parts suggest, seen by running it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from moeq_plugin.integrations.llm_compressor.two_streams.layer_calls import LayerCalls, inputs_of
from moeq_plugin.models.decoders import DecoderLayer

_TOLERANCE = 0.02  # bfloat16 rounds by up to 0.4 % several times


@torch.no_grad()
def why_unlike(layer: DecoderLayer, calls: LayerCalls) -> str | None:
    """Return why corrected targets would be wrong in a layer, ``None`` if they would not.

    The correction takes for granted that the outputs of attention and MLP are added to the residual
    stream as they are, and that a MoE block hands its own input to what is in it.

    Args:
        layer: with its 16-bit weights.
        calls: what it is called with; its first batch is run.
    """
    out, mlp = layer.attention.child("o_proj"), layer.mlp
    norms = layer.attention_norm, layer.mlp_norm
    children = dict(mlp.module.named_children())
    inner = [children[name] for name in _INNER if name in children]
    given: dict[nn.Module, torch.Tensor] = {}
    put_out: dict[nn.Module, torch.Tensor] = {}
    noted = [norm.module for norm in norms] + [mlp.module, *inner]
    with inputs_of(noted, given), _outputs_of([out.module, mlp.module], put_out):
        after = calls.run(0)
    if given.keys() != set(noted) or len(put_out) != 2 or after is None:
        return "not all of its parts are called, or not as modules"
    before, between = (given[norm.module] for norm in norms)
    for name, start, added, end in (
        ("attention", before, put_out[out.module], between),
        ("MLP", between, put_out[mlp.module], after.flatten(0, -2)),
    ):
        if not is_near(start + added, end):
            return f"the output of its {name} is not added to the residual stream as it is"
    if not all(is_near(given[part], given[mlp.module]) for part in inner):
        return "its experts do not receive what the MoE block receives"
    if not is_near(before, calls.hidden(0).flatten(0, -2)):
        return "its first norm does not receive what the layer receives"
    return None


_INNER = ("experts", "shared_expert", "shared_experts")


def is_near(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    """Tell whether two tensors are the same but for rounding."""
    if tensor.shape != expected.shape:
        return False
    difference = (tensor.float() - expected.float()).norm()
    return bool(difference <= _TOLERANCE * expected.float().norm())


@contextlib.contextmanager
def _outputs_of(modules: list[nn.Module], noted: dict[nn.Module, torch.Tensor]) -> Iterator[None]:
    def hook(module: nn.Module) -> Callable[..., None]:
        def note(_module: nn.Module, _args: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            assert isinstance(tensor, torch.Tensor)
            noted[module] = tensor.flatten(0, -2) if tensor.ndim > 2 else tensor

        return note

    handles = [module.register_forward_hook(hook(module)) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
