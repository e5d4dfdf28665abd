"""Make transformers know RWKV-6 and RWKV-7, and let it load compressed RWKV-4.

All that this package changes about transformers, a module of others, happens here and nowhere else
in it. ``import moeq_plugin.rwkv`` calls :func:`register`.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.rwkv.modeling_rwkv import RwkvPreTrainedModel

from moeq_plugin.rwkv.rwkv6 import RWKV6Config, RWKV6ForCausalLM, RWKV6Model
from moeq_plugin.rwkv.rwkv7 import RWKV7Config, RWKV7ForCausalLM, RWKV7Model
from moeq_plugin.rwkv.tokenizer import RWKVWorldTokenizer

_GUARD = "_skips_linears_without_weight"


def register() -> None:
    """Change transformers for the whole process, in two ways; a second call changes nothing.

    * ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM`` know the model types ``rwkv6`` and
      ``rwkv7``, and ``AutoTokenizer`` their tokenizer.
    * ``RwkvPreTrainedModel``, the RWKV-4 of transformers, initializes no linear that has no
      ``weight``: see :func:`guard_initialization`. Other models are initialized as before.
    """
    AutoConfig.register("rwkv6", RWKV6Config, exist_ok=True)
    AutoModel.register(RWKV6Config, RWKV6Model, exist_ok=True)
    AutoModelForCausalLM.register(RWKV6Config, RWKV6ForCausalLM, exist_ok=True)
    AutoConfig.register("rwkv7", RWKV7Config, exist_ok=True)
    AutoModel.register(RWKV7Config, RWKV7Model, exist_ok=True)
    AutoModelForCausalLM.register(RWKV7Config, RWKV7ForCausalLM, exist_ok=True)
    for config in (RWKV6Config, RWKV7Config):
        AutoTokenizer.register(config, slow_tokenizer_class=RWKVWorldTokenizer, exist_ok=True)
    guard_initialization(RwkvPreTrainedModel)


def guard_initialization(model_class: type[Any]) -> None:
    """Let ``model_class`` initialize no linear that has no ``weight``; once is enough.

    When a checkpoint is loaded, transformers' RWKV-4 initializes every linear by reading its
    ``weight``. A compressed linear has none (``weight_packed`` and others instead), so that loading
    would stop with an ``AttributeError``.
    """
    initialize = model_class._init_weights
    if hasattr(initialize, _GUARD):
        return

    @wraps(initialize)
    def guarded(self: Any, module: nn.Module) -> None:
        if not isinstance(module, nn.Linear) or getattr(module, "weight", None) is not None:
            initialize(self, module)

    setattr(guarded, _GUARD, True)
    model_class._init_weights = guarded
