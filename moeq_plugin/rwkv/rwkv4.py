"""RWKV-4 of transformers, made to quantize and to load afterwards.

When a checkpoint is loaded, ``RwkvPreTrainedModel`` initializes every linear by reading its
``weight``. A compressed linear has none (``weight_packed`` and others instead), so loading stops
with an ``AttributeError``. Importing this module keeps such linears away from the initializer.

A model of more than ``rescale_every`` layers also divides weights in place at its first call in
evaluation mode, which calibration repeats and a saved model carries: see
:func:`disable_rescaling`.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn
from transformers.models.rwkv.modeling_rwkv import RwkvPreTrainedModel

_GUARD = "_skips_linears_without_weight"


def guard_initialization(model_class: type[Any]) -> None:
    """Let ``model_class`` initialize no linear that has no ``weight``; once is enough."""
    initialize = model_class._init_weights
    if hasattr(initialize, _GUARD):
        return

    @wraps(initialize)
    def guarded(self: Any, module: nn.Module) -> None:
        if not isinstance(module, nn.Linear) or getattr(module, "weight", None) is not None:
            initialize(self, module)

    setattr(guarded, _GUARD, True)
    model_class._init_weights = guarded


def disable_rescaling(model: nn.Module) -> None:
    """Let an RWKV-4 keep its weights as they were loaded, in place; call it before quantization.

    The rescaling only keeps float16 from overflowing. Without it the logits are the same but for
    the epsilon of the norms. Being by powers of two, what was rescaled is restored exactly.
    """
    base: Any = getattr(model, "rwkv", model)
    was_training = base.training
    base.train()
    if base.layers_are_rescaled:
        base._rescale_layers()
    base.config.rescale_every = 0
    base.train(was_training)


guard_initialization(RwkvPreTrainedModel)
