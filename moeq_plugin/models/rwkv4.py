"""RWKV-4 of transformers, made to load after quantization.

When a checkpoint is loaded, ``RwkvPreTrainedModel`` initializes every linear by reading its
``weight``. A compressed linear has none (``weight_packed`` and others instead), so loading stops
with an ``AttributeError``. Importing this module keeps such linears away from the initializer.
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


guard_initialization(RwkvPreTrainedModel)
