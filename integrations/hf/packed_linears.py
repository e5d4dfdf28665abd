"""Linears that transformers has loaded compressed stay packed when the model runs.

By itself compressed-tensors decompresses all of them before the first run, and keeps them so.
"""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import nn

from moeq_plugin.integrations.llm_compressor.schemes import grid_of, scheme_of
from moeq_plugin.models.packed_grid import GridLinear


def keep_linears_packed(model: nn.Module) -> int:
    """Replace the compressed linears of a model by packed ones, in place, as far as there are such.

    What has no packed form (other formats, quantized activations, reordered columns) stays, to be
    decompressed by compressed-tensors as before.

    Args:
        model: as transformers loads it; not run yet.

    Returns:
        How many linears were replaced.
    """
    found = {name: module for name, module in model.named_modules() if _is_packable(module)}
    for name, module in found.items():
        model.set_submodule(name, _packed(module))
    if found and not any(hasattr(module, "weight_packed") for module in _compressed(model)):
        hook = getattr(model, "ct_decompress_hook", None)
        if hook is not None:  # nothing is left for it, and it would walk through the whole model
            hook.remove()
            del model.ct_decompress_hook
    return len(found)


def unpack_linears(model: nn.Module) -> None:
    """Replace packed linears by plain ones, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, GridLinear):
            model.set_submodule(name, module.unpacked())


def _compressed(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if scheme_of(module) is not None]


def _is_packable(module: nn.Module) -> bool:
    scheme, packed = scheme_of(module), getattr(module, "weight_packed", None)
    if scheme is None or scheme.weights is None or not isinstance(packed, torch.Tensor):
        return False
    is_weight_only = scheme.input_activations is None and scheme.output_activations is None
    has_order = getattr(module, "weight_g_idx", None) is not None
    return is_weight_only and not has_order and grid_of(scheme.weights) is not None


def _packed(module: nn.Module) -> GridLinear:
    scheme = scheme_of(module)
    args = scheme.weights if scheme is not None else None
    assert isinstance(args, QuantizationArgs)
    stored = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers())
    rows, columns = (int(size) for size in stored["weight_shape"])
    zero_point = None if args.symmetric else stored["weight_zero_point"]
    return GridLinear(
        stored["weight_packed"].detach(),
        stored["weight_scale"].detach(),
        None if zero_point is None else zero_point.detach(),
        (rows, columns),
        args.num_bits,
        getattr(module, "bias", None),
    )
